"""Names and messages of others reach the screen, Markdown and HTML as text, never as commands."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from amoeba_export.builds.logs import Logged, open_log
from amoeba_export.builds.outcome import ErrorRecord
from amoeba_export.builds.report import write_reports
from amoeba_export.cli import console
from amoeba_export.shown import an, as_code, for_markdown, for_terminal
from tests.builds.test_report import MEASURED, report
from tests.conftest import Run
from tests.trust.conftest import Place
from tests.trust.planted import renew_checksums

Amoeba = Callable[..., Run]

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\rhidden\u202e"
"""Sets the window's title, clears the screen, colours with one byte, goes back to the start, turns the direction."""
SPELLED = r"\x1b]0;owned\x07\x1b[2J\x9b31m\x0dhidden\u202e"
SEEN = SPELLED.replace(r"\x07", "").replace(r"\x0d", "")
"""rich leaves out a few characters itself."""


def is_plain(text: str) -> bool:
    return for_terminal(text) == text


def test_what_is_not_seen_is_spelled() -> None:
    assert for_terminal(EVIL) == SPELLED
    assert for_terminal(SPELLED) == SPELLED
    assert for_terminal("\udce9") == r"\udce9", "a byte of a file name that is not UTF-8: no stream could write it"
    for seen in ("", "a\n\tb", "naïve", "日本語", "👩‍🚀", "می‌خواهم", r"C:\x"):
        assert for_terminal(seen) == seen


def test_text_stays_text_in_markdown() -> None:
    for name in ("SmolLM2-135M", "HuggingFaceTB/SmolLM2_135M", "a & b", "4x0.5", "it's 3 % (more)!", "model.gguf"):
        assert for_markdown(name) == name
    assert for_markdown("<img src=x onerror=alert(1)>") == "&lt;img src=x onerror=alert(1)&gt;"
    assert for_markdown("![x](http://evil) **b** `c` a|b\n# d") == r"!\[x\](http://evil) \*\*b\*\* \`c\` a\|b # d"
    assert for_markdown("&lt;b&gt;") == "&amp;lt;b&amp;gt;"
    assert for_markdown("_a_b_") == r"\_a_b\_"
    assert for_markdown("\x1b[31m") == r"\\x1b\[31m"


def test_code_ends_where_it_should() -> None:
    assert as_code("org/name") == "`org/name`"
    assert as_code("a`b``c\n\nd") == "``` a`b``c d ```"


def test_both_consoles_show_and_do_not_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    shown = console.table(EVIL)
    shown.add_row(EVIL)
    for renderable in (EVIL, Text(EVIL), shown, console.facts({EVIL: EVIL}), console.titled(EVIL, EVIL)):
        console.answer().print(renderable)
    console.print_json({EVIL: EVIL})
    talk = console.Talk()
    talk.note(EVIL)
    talk.warn(EVIL)
    talk.error(f"{EVIL}\n{EVIL}")
    talk.show(shown)
    for text in (out.getvalue(), err.getvalue()):
        assert is_plain(text)
        assert "owned" in text
    assert json.loads(out.getvalue()[out.getvalue().index("{") :]) == {EVIL: EVIL}


def test_a_terminal_keeps_its_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    err = Terminal()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console.Talk().warn(EVIL)
    assert re.sub(r"\x1b\[[\d;]*m", "", err.getvalue()) == f"warning: {SEEN}\n"
    assert "\x1b[33m" in err.getvalue()


def _manifest_with(artifact: Path, **changes: Any) -> None:
    path = artifact / "amoeba.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("words", [["inspect"], ["verify", "--checksums-only"], ["verify"], ["--debug", "verify"]])
def test_an_artifact_does_not_command_the_terminal(amoeba: Amoeba, place: Place, words: list[str]) -> None:
    _manifest_with(place.artifact, model=EVIL, tool={"amoeba": "1", EVIL: EVIL}, quality={EVIL: 1.0})
    renew_checksums(place.artifact)
    run = amoeba(*words, place.artifact)
    assert "owned" in run.out + run.err
    assert is_plain(run.out + run.err)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_does_not_command_the_terminal(amoeba: Amoeba, place: Place, file: str) -> None:
    """A type in the config, the name of a weight: both are in a message."""
    if file == "config.json":
        path = place.model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": EVIL}))
    else:
        from safetensors.torch import load_file, save_file

        weights = load_file(place.model / file)
        save_file({**weights, EVIL: weights["model.norm.weight"].clone()}, place.model / file)
    run = amoeba("inspect", place.model)
    assert run.code in (3, 7)
    assert SEEN in run.err
    assert is_plain(run.err)


def test_a_model_card_says_a_name_and_nothing_else(amoeba: Amoeba, place: Place, tmp_path: Path) -> None:
    name = 'x`<img src="a">\x1b[2J[click](http:evil)'
    shutil.copytree(place.model, tmp_path / name)
    words = ("export", tmp_path / name, "--shape", "4x1", "--format", "safetensors", "--out", tmp_path / "out")
    assert amoeba(*words).code == 0
    card = (tmp_path / "out" / "safetensors" / "README.md").read_text()
    assert is_plain(card)
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert title == r'# x\`&lt;img src="a"&gt;\\x1b\[2J\[click\](http:evil), cut to 4x1'
    assert r'A dense subnet of `` x`<img src="a">\x1b[2J[click](http:evil) ``, made' in card


def test_reports_and_logs_of_a_build(tmp_path: Path) -> None:
    import dataclasses
    import threading

    error = ErrorRecord(kind="InputError", exit_code=3, message=f"<b>{EVIL}</b>", where=EVIL, next_step=f"[a]({EVIL})")
    entries = (
        dataclasses.replace(MEASURED, name=f"*{EVIL}*", target=f"`{EVIL}`"),
        dataclasses.replace(MEASURED, name="<i>b</i>", status="failed", error=error),
    )
    for path in write_reports(dataclasses.replace(report(), entries=entries), tmp_path):
        text = path.read_text()
        assert is_plain(text), path
        if path.name in ("summary.md", "report.html"):
            assert "<b>" not in text
            assert "<i>" not in text
    summary = (tmp_path / "summary.md").read_text()
    assert f"| {for_markdown('*' + EVIL + '*')} | {for_markdown('`' + EVIL + '`')} |" in summary
    assert "**failed**" in summary

    class Silent:
        def note(self, message: str) -> None: ...

    with open_log(tmp_path / "log") as log:
        Logged("a", log, Silent(), threading.Event()).note(EVIL)  # type: ignore[arg-type]
    assert (tmp_path / "log").read_text().endswith(f"{SPELLED}\n")


def test_a_name_has_its_article() -> None:
    assert [an("llama"), an("olmo2"), an("exaone4", begins=True), an("")] == ["a llama", "an olmo2", "An exaone4", "a "]
