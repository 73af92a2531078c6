"""Every reader, given damaged files: it succeeds or raises an `AmoebaError`, within bounds of time and memory.

`make fuzz` does the same 10,000 times. Here each reader gets a few, always the same.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from amoeba_export.errors import DamagedFile, InputError
from amoeba_export.load.unpickle import load_pickled_npy
from tests.fuzz import __main__ as long_run
from tests.fuzz.bounded import violation
from tests.fuzz.mutations import NESTED, files
from tests.fuzz.readers import READERS
from tests.fuzz.valid import GOLDENS, make_valid

CASES = Path(__file__).parent / "cases"
NAMES = sorted(path.name for path in CASES.iterdir())
ALIASES = {
    "jsonl": ("documents", "choices", "training", "tasks"),
    "toml": ("target",),
    "strategy": ("strategy", "fixed"),
}
"""First part of a case's name -> the readers that it is for; every other one is a reader's name."""


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("valid")
    make_valid(root)
    return root


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused(reader: str, valid: Path) -> None:
    file = valid / READERS[reader].file
    assert violation(reader, valid, file.read_bytes()) is None
    READERS[reader].read(file)  # the file that all others are made from is sound

    @settings(
        max_examples=12, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(files(READERS[reader].form, file))
    def feed(content: bytes) -> None:
        assert violation(reader, valid, content) is None

    feed()


@pytest.mark.parametrize("name", NAMES)
def test_what_once_broke_a_reader_is_refused(name: str, valid: Path) -> None:
    kind = name.partition("-")[0]
    for reader in ALIASES.get(kind, (kind,)):
        content = (CASES / name).read_bytes()
        assert violation(reader, valid, content) is None
        file = valid / READERS[reader].file
        before = file.read_bytes()
        file.write_bytes(content)
        try:
            with pytest.raises(InputError):
                READERS[reader].read(file)
        finally:
            file.write_bytes(before)


@pytest.mark.parametrize("nested", NESTED)
def test_deep_values_in_a_pickle_are_refused_before_it_is_run(nested: object, tmp_path: Path) -> None:
    """A tuple 200,000 deep is hashed as a key on the C stack: it would end the process."""
    content = (GOLDENS / "dp_selection_strategy.npy").read_bytes()
    file = tmp_path / "x.npy"
    file.write_bytes(content[: content.index(b"\x80")] + nested(200_000))  # type: ignore[operator]
    with pytest.raises(DamagedFile, match="nested more than 64 deep"):
        load_pickled_npy(file)


@pytest.mark.parametrize(
    ("reader", "change"),
    [
        ("config", {"num_hidden_layers": 10**9}),
        ("smolconf", {"num_experts": 10**15}),
        (
            "table",
            {"measurements": [{"layers": [[6, 3, 96, 10**12]], "prompt_tokens": 1, "decode": {}, "prefill": {}}]},
        ),
    ],
)
def test_declared_sizes_are_bounded_before_they_are_looped_over(
    reader: str, change: dict[str, object], valid: Path
) -> None:
    content = json.loads((valid / READERS[reader].file).read_text()) | change
    assert violation(reader, valid, json.dumps(content).encode()) is None


def test_the_layers_of_a_cost_table_are_counted_before_they_are_laid_out(valid: Path) -> None:
    content = json.loads((valid / "table" / "table.json").read_text())
    content["measurements"][0]["layers"] = [[6, 3, 96, 10**12]]
    copy = valid / "table" / "other.json"
    copy.write_text(json.dumps(content))
    with pytest.raises(DamagedFile, match="more layers than its model"):
        READERS["table"].read(copy)


@pytest.mark.parametrize("value", [0, -1.0, 1e300, "1"])
def test_a_cost_table_with_a_cost_that_is_none_is_refused(value: object, valid: Path) -> None:
    file = valid / "table" / "table.json"
    content = json.loads(file.read_text())
    size = len(content["fits"]["decode_p50"]["coefficients_ms"])
    content["fits"]["decode_p50"]["coefficients_ms"] = [value] * size
    copy = valid / "table" / "other.json"
    copy.write_text(json.dumps(content))
    with pytest.raises(DamagedFile, match="decode_p50"):
        READERS["table"].read(copy)


def test_the_long_run_reports_what_it_did(valid: Path, tmp_path: Path) -> None:
    code, said = long_run.in_child(lambda: long_run.feed("recipe", valid, 3, 0, tmp_path))
    assert code == 0, said
    assert json.loads(said.splitlines()[-1]) == {"reader": "recipe", "cases": 3, "faults": []}


def test_a_reader_that_ends_its_process_is_told_of() -> None:
    code, _ = long_run.in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert code == -signal.SIGKILL
