"""Texts use the words of the field: private ones have crept in before, and nobody else knows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRIVATE = {
    r"(?<!\w)in company\b|\b_?compan(?:y|ies)\b": "say what else runs, or call it a group",
    r"\bbeside itself\b": "say 'a copy of itself'",
    r"\bby hand\b": "name the command and the rounds, or move it to dev/LOG.md; for a user: 'yourself'",
    r"\bbeside the peers\b": "say 'other tools'",
}
TEXTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*", "dev/*.md", "examples/**/*", "targets/*", "amoeba_export/**/*")
    for path in ROOT.glob(pattern)
    if path.is_file() and path.suffix in (".md", ".py", ".toml", ".j2", ".sh", ".yml", ".ipynb")
)


def test_there_are_texts() -> None:
    assert len(TEXTS) > 300


@pytest.mark.parametrize("word", PRIVATE)
def test_private_words_are_not_used(word: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}: {PRIVATE[word]}"
        for path in TEXTS
        for match in re.finditer(word, path.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_sentences_of_the_manual_are_short(page: Path) -> None:
    """Forty words are too many to read once. Generated pages, tables and code are not prose."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^(?:    .*|\|.*|#.*)$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?:- |\d+\. )", text):
        for sentence in re.split(r"(?<=[.:;?!])\s+", " ".join(paragraph.split())):
            assert len(sentence.split()) <= 40, sentence
