"""Pages are what the code is: generated ones up to date, links lead somewhere, settings and options exist."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from amoeba_export.backends.targets import parse_options, read_target
from amoeba_export.builds.read import read_config
from amoeba_export.cli.app import app
from amoeba_export.load.family_file import _TABLES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATE: dict[str, Any] = runpy.run_path(str(DOCS / "generate.py"))
HOOKS: dict[str, Any] = runpy.run_path(str(DOCS / "hooks.py"))
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]}


@pytest.mark.parametrize("page", [name for name in GENERATE["PAGES"] if name not in ("commands.md", "errors.md")])
def test_the_generated_pages_are_up_to_date(page: str) -> None:
    """If not: python docs/generate.py"""
    assert (DOCS / page).read_text(encoding="utf-8") == GENERATE["PAGES"][page]()


def test_lists_of_commands_are_whole() -> None:
    assert not re.findall(r"^\* .*\.\.\.$", TEXTS[DOCS / "commands.md"], re.MULTILINE)


def test_every_page_is_in_the_navigation_once() -> None:
    found = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1])
    assert sorted(found) == [path.name for path in PAGES]


def test_the_site_is_configured_by_valid_yaml() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["hooks"] == ["docs/hooks.py"]


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and folders of the repository, and headings of pages."""
    for link, anchor in _links(TEXTS[page]):
        target = (page.resolve().parent / link).resolve() if link else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor[1:] in _anchors(target.read_text(encoding="utf-8")), f"{link}{anchor}"


def _links(text: str) -> list[tuple[str, str]]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\((?!https?:|mailto:)([^()\s#]*)(#[^()\s]*)?\)", prose)
    return [(link, anchor) for link, anchor in found if link or anchor]


def _anchors(text: str) -> set[str]:
    """As Python-Markdown makes them of headings."""
    found = set(re.findall(r"^#+ .*\{#([\w-]+)\}$", text, re.MULTILINE))
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", words))
    return found


def test_links_out_of_the_pages_lead_to_the_repository() -> None:
    resolved = HOOKS["resolved"]
    page, repo = DOCS / "run.md", "https://host/repo"
    assert resolved("../examples/ci", page, repo) == f"{repo}/tree/main/examples/ci"
    assert resolved("../amoeba_export/errors.py", page, repo) == f"{repo}/blob/main/amoeba_export/errors.py"
    assert resolved("formats.md", page, repo) == "formats.md"
    assert resolved("../CHANGELOG.md", page, repo) == "changelog.md"
    assert resolved("docs/python.md", DOCS / "architecture.md", repo) == "python.md"
    with pytest.raises(FileNotFoundError, match=r"run\.md links to gone\.md"):
        resolved("gone.md", page, repo)


def test_lines_end_neither_inside_an_option_nor_before_a_unit() -> None:
    together = HOOKS["kept_together"]
    assert together("<code>export --heal off</code>") == '<code>export <span class="option">--heal</span> off</code>'
    assert (
        together("<code>one-lora</code>, 75 % of 8.7 ms, 2 GiB")
        == "<code>one-lora</code>, 75\u00a0% of 8.7\u00a0ms, 2\u00a0GiB"
    )
    assert together("4 shapes, 2 steps") == "4 shapes, 2 steps"
    block = "<pre><span></span><code>head -n 5 s\namoeba export --latency 50 ms\n</code></pre>"
    assert together(block) == block


def test_pages_with_pieces_of_files_are_generated() -> None:
    """A page on GitHub shows what is in its file: a marker of an extension of MkDocs would be shown as it is."""
    assert [path.name for path in PAGES if "--8<--" in TEXTS[path]] == []
    assert {path.name for path in PAGES if "<!-- from " in TEXTS[path]} <= GENERATE["PAGES"].keys()


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.name)
def test_settings_are_ones_that_there_are(page: Path, tmp_path: Path) -> None:
    """Every TOML block that is a whole target or a whole amoeba.toml is read as one."""
    for i, block in enumerate(re.findall(r"^```toml\n(.*?)^```$", TEXTS[page], re.MULTILINE | re.DOTALL)):
        file = tmp_path / f"{i}.toml"
        file.write_text(block)
        if "[[build]]" in block:
            read_config(file)
        elif re.search("^backend = ", block, re.MULTILINE) and re.search("^description = ", block, re.MULTILINE):
            parse_options(read_target(file))


def _commands() -> dict[str, set[str]]:
    """Every command with its options."""
    found: dict[str, set[str]] = {}

    def add(command: Any, name: str) -> None:
        found[name] = {word for one in command.params for word in (*one.opts, *one.secondary_opts) if word[:2] == "--"}
        for word, inner in getattr(command, "commands", {}).items():
            add(inner, f"{name} {word}")

    add(typer.main.get_command(app), "amoeba")
    return found


def _calls(page: Path) -> list[str]:
    """Calls of `amoeba`: in a page its code, blocks and inline; in other files every line."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    if page.suffix != ".md":
        return re.findall(r"^\s*(?:- |run: |\$\(BIN\)/)*(amoeba [a-z].*)$", text, re.MULTILINE)
    blocks = re.findall(r"^```(?:bash|console|sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(?:- run: )?(amoeba [a-z].*)$", text, re.MULTILINE)
    inline = re.findall(r"`(amoeba [a-z][^`]*)`", re.sub("\n", " ", text))
    return [
        *(line for block in blocks for line in block.splitlines() if line.startswith("amoeba ")),
        *indented,
        *inline,
    ]


@pytest.mark.parametrize(
    "page",
    [*TEXTS, ROOT / "examples/tutorial.sh", ROOT / "Makefile", *(ROOT / "examples/ci").iterdir()],
    ids=lambda path: path.name,
)
def test_commands_and_options_are_ones_that_there_are(page: Path) -> None:
    commands = _commands()
    for line in _calls(page):
        name, words = "amoeba", shlex.split(re.sub(r"['\"]", "", line), comments=True)[1:]
        while words and f"{name} {words[0]}" in commands:
            name, words = f"{name} {words[0]}", words[1:]
        assert name != "amoeba", f"no such command: {line}"
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert option in commands[name] | commands["amoeba"] | {"--help"}, f"{option} of {name}: {line}"


def test_calls_are_found_in_pages_and_in_scripts() -> None:
    assert "amoeba doctor" in _calls(DOCS / "index.md")[-1]
    assert any("--grid" in line and "--plot" in line for line in _calls(ROOT / "examples/tutorial.sh"))
    assert len([line for page in TEXTS for line in _calls(page)]) > 100


def test_the_page_about_families_names_every_table_of_their_files() -> None:
    assert all(f"| `[{table}]` |" in TEXTS[DOCS / "extending.md"] for table in _TABLES)


def test_every_key_of_a_json_file_has_a_meaning() -> None:
    """If not: the class in the code has no line for it under `Attributes`."""
    assert re.findall(r"^\| `\w+` \|.*\| *\|$", TEXTS[DOCS / "json.md"], re.MULTILINE) == []
