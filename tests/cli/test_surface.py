"""The commands and options that scripts rely on. Adding one is a line here; renaming one breaks somebody's CI."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import typer

from amoeba_export.cli.app import app
from amoeba_export.cli.options import Dtype, SearchedDtype
from amoeba_export.ir.dtype import AUTO, DTYPE_NAMES

EXPORT_AND_SEARCH = (
    "MODEL --target --latency --throughput --memory --quality --quality-loss --metric --percentile --prompt --generate "
    "--batch --strategy "
    "--recipe --seed --adapter --policy --format --dtype --plot --json"
)
SURFACE = {
    "amoeba": "--version --debug --install-completion --show-completion",
    "amoeba export": (
        f"{EXPORT_AND_SEARCH} --refit --heal --calibration-data --rounding --vocab-keep --shape --plan --pick "
        "--require-measured --out --force --dry-run"
    ),
    "amoeba search": f"{EXPORT_AND_SEARCH} --refit --calibration-data",
    "amoeba frontier": f"{EXPORT_AND_SEARCH} --refit --calibration-data --measure",
    "amoeba refit": "MODEL --plan --out --refit --calibration-data --strategy --recipe --adapter --seed --json",
    "amoeba heal": "MODEL --plan --out --heal --refit --calibration-data --strategy --recipe --adapter --seed --json",
    "amoeba init": "AMOEBA.TOML --force",
    "amoeba build": "AMOEBA.TOML --locked --engine --only --jobs --plot --json",
    "amoeba cache": "",
    "amoeba cache info": "--json",
    "amoeba cache prune": "--older-than --kind --json",
    "amoeba calibrate": "MODEL --recipe --seed --engine --ray-address --out --json",
    "amoeba finetune": (
        "MODEL --strategy --data --out --mode --rank --alpha --experts --top-k --targets --gate-warmup --subnets "
        "--depths --widths --shape --policy --kd-weight --temperature --balance --mask --max-steps --batch-size "
        "--gradient-accumulation --learning-rate --schedule --warmup --weight-decay --max-grad-norm --max-length "
        "--packing --prompt-format --dtype --gradient-checkpointing --save-every --seed --resume --force --json"
    ),
    "amoeba evaluate": (
        "MODEL|ARTIFACT --text --window --windows --tasks --task-folder --limit --shape --grid --depths --widths "
        "--strategy --adapter --policy --dtype --format --out --plot --json"
    ),
    "amoeba profile": (
        "MODEL --target --out --dtype --prompt --generate --batch --threads --host --port --identity --json"
    ),
    "amoeba bench": (
        "ARTIFACT... --target --prompt --generate --batch --rounds --baseline --metric --fail-if-slower --plot --json"
    ),
    "amoeba inspect": "FILE|DIR --html --json",
    "amoeba verify": "ARTIFACT --model --strategy --adapter --refit --rounding --checksums-only --json",
    "amoeba import": "UPSTREAM.npy MODEL --out --json",
    "amoeba targets": "",
    "amoeba targets list": "--json",
    "amoeba targets show": "NAME|FILE --json",
    "amoeba targets check": "NAME|FILE --json",
    "amoeba targets fit": "FILE --points --like --json",
    "amoeba targets new": (
        "FILE --description --backend --like --flow --power-mode --format --dtype --metric --memory --align --option "
        "--limit --json"
    ),
    "amoeba doctor": "--json",
}


def surface(command: Any, name: str) -> dict[str, set[str]]:
    found = {
        name: {
            word
            for parameter in command.params
            for word in ([parameter.metavar] if parameter.param_type_name == "argument" else parameter.opts)
        }
    }
    for child in getattr(command, "commands", {}).values():
        found |= surface(child, f"{name} {child.name}")
    return found


def test_the_surface_is_frozen() -> None:
    expected = {name: set(words.split()) for name, words in SURFACE.items()}
    assert surface(typer.main.get_command(app), "amoeba") == expected


def test_help_names_the_dtypes_that_there_are() -> None:
    for annotated, names in ((Dtype, DTYPE_NAMES), (SearchedDtype, (*DTYPE_NAMES, AUTO))):
        (option,) = annotated.__metadata__  # type: ignore[attr-defined]
        assert option.metavar == "|".join(names)
        assert option.autocompletion("") == list(names)


@pytest.mark.parametrize("page", ["commands.md", "errors.md", "../ARCHITECTURE.md"])
def test_the_pages_are_up_to_date(page: str) -> None:
    """If not: python docs/generate.py"""
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / page).read_text() == runpy.run_path(str(docs / "generate.py"))["PAGES"][page]()
