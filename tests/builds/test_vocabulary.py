"""`vocab_keep` in amoeba.toml: measured, searched and locked with the head that is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from amoeba_export import ExportRequest
from amoeba_export.application import costs
from amoeba_export.application.resolve import resolve
from amoeba_export.application.session import open_session
from amoeba_export.artifact import read_manifest
from amoeba_export.builds.inputs import entry_inputs
from amoeba_export.builds.lock import read_lock
from amoeba_export.builds.read import read_config
from amoeba_export.cache import Cache
from amoeba_export.errors import BadConfig
from tests import imaginary
from tests.builds.conftest import HEAD, Build, statuses

SMALL = """\
[[build]]
name = "small"
target = "imaginary.toml"
latency = "60%"
formats = ["onnx"]
dtype = "fp32"
vocab_keep = "ids.json"
"""
IDS = [3, 4, 5, 9, 70, 71, 120]
KEPT = (0, 1, 2, *IDS)


@pytest.fixture
def small(project: Path) -> Path:
    (project / "ids.json").write_text(json.dumps(IDS))
    (project / "amoeba.toml").write_text(HEAD + SMALL)
    return project


def test_everything_that_is_measured_has_the_head_that_is_written(
    run: Build, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    real = costs.measure_latency

    def spied(subjects, *args, **kwargs):  # type: ignore[no-untyped-def]
        measured.extend(subjects)
        return real(subjects, *args, **kwargs)

    monkeypatch.setattr(costs, "measure_latency", spied)
    assert statuses(run()) == {"small": "built"}
    assert len(measured) > 12
    assert {subject.dense.base.head_rows for subject in measured} == {len(KEPT)}
    assert {dense.base.head_rows for dense in imaginary.BACKEND.measured_artifacts} == {len(KEPT)}
    manifest = read_manifest(small / "dist" / "small")
    assert manifest.dims["head_rows"] == len(KEPT)
    assert manifest.vocabulary is not None
    # This model has no tokenizer, so there is nothing to measure it on.
    assert (manifest.vocabulary.tokens, manifest.vocabulary.of, manifest.vocabulary.loss) == (len(KEPT), 128, None)


def test_a_cost_table_is_of_one_head(small: Path) -> None:
    request = ExportRequest(
        model=str(small / "model"), strategy=small / "strategy.safetensors", target=str(small / "imaginary.toml"),
        latency="60%", dtype="fp32", formats=("onnx",), refit="off", vocab_keep=str(small / "ids.json"),
    )  # fmt: skip
    session = open_session(resolve(request))
    facts = costs.table_facts(session.supernet, costs.profiling_of(session))
    table = costs.make_predictor(session)
    whole = session.with_supernet(session.supernet.with_head_tokens(None))
    assert costs.table_facts(whole.supernet, costs.profiling_of(whole)) != facts
    assert table.predict(session.full)[0] > 0
    with pytest.raises(Exception, match="its head_rows is 10, not None"):
        table.predict(whole.full)


def test_a_lock_names_the_tokens_and_rebuilds_the_same_bytes(run: Build, small: Path, tmp_path: Path) -> None:
    run()
    lock = (small / "amoeba.lock").read_text(encoding="utf-8")
    assert 'head_tokens = "0-5,9,70-71,120"' in lock
    assert read_lock(small / "amoeba.lock")["small"].plan.head_tokens == KEPT
    before = read_manifest(small / "dist" / "small")
    shutil.rmtree(small / "dist")
    assert statuses(run(locked=True)) == {"small": "built"}
    after = read_manifest(small / "dist" / "small")
    assert (after.files, after.vocabulary, after.inputs) == (before.files, before.vocabulary, before.inputs)
    assert (small / "amoeba.lock").read_text(encoding="utf-8") == lock
    assert statuses(run(locked=True)) == {"small": "up-to-date"}


def test_other_tokens_are_other_inputs(run: Build, small: Path) -> None:
    run()
    (small / "ids.json").write_text(json.dumps(IDS[:-1]))
    report = run(locked=True)
    assert [entry.error.message for entry in report.failed if entry.error] == [
        "The build 'small' is locked and its inputs have changed: the vocabulary 'ids.json' is another one."
    ]
    assert statuses(run()) == {"small": "built"}
    assert read_lock(small / "amoeba.lock")["small"].plan.head_tokens == KEPT[:-1]


def test_what_a_number_of_tokens_depends_on(small: Path) -> None:
    def named(keep: str) -> dict[str, str]:
        (small / "amoeba.toml").write_text(HEAD + SMALL.replace('"ids.json"', keep))
        (entry,) = read_config(small / "amoeba.toml").entries
        return {item.id: item.sha256 for item in entry_inputs(entry, Cache()) if item.role == "vocabulary"}

    assert list(named('"100"')) == ["100 tokens"]
    assert named('"100"') != named('"101"')


@pytest.mark.parametrize(
    ("keep", "words"),
    [('"0"', "--vocab-keep cannot be '0'"), ('"no.txt"', "the vocabulary was not found"), ("8192", "vocab_keep")],
)
def test_what_cannot_be_kept_is_a_mistake_in_the_file(small: Path, keep: str, words: str) -> None:
    (small / "amoeba.toml").write_text(HEAD + SMALL.replace('"ids.json"', keep))
    with pytest.raises(BadConfig) as caught:
        read_config(small / "amoeba.toml")
    assert words in str(caught.value)
