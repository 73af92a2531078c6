from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from amoeba_export.artifact import read_manifest, verify_checksums
from amoeba_export.builds import inputs
from amoeba_export.builds.lock import read_lock
from amoeba_export.builds.outcome import BuildReport, read_report
from amoeba_export.cache.kinds import ARTIFACT, CHOOSING_INTEGERS
from amoeba_export.cli.app import main
from amoeba_export.errors import NotLocked, UnknownName
from amoeba_export.ir.frontier import Frontier
from amoeba_export.materialize import stream
from tests.builds.conftest import HEAD, TWO, Build, statuses


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()}


def weights(folder: Path) -> dict[str, str]:
    return {file.path: file.sha256 for file in read_manifest(folder).files if file.path.endswith(".safetensors")}


def test_artifacts_lock_logs_and_report(run: Build, project: Path):
    report = run()
    assert statuses(report) == {"whole": "built", "half": "built"}
    assert report.exit_code == 0
    for name in ("whole", "half"):
        verify_checksums(project / "dist" / name)
        assert "shape 3x" in (project / "dist" / "logs" / f"{name}.log").read_text()
    assert read_report(project / "dist") == report
    locked = read_lock(project / "amoeba.lock")
    assert [layer.source_layer for layer in locked["half"].plan.layers] == [0, 1, 3]
    assert locked["half"].plan.to_json() == json.loads((project / "dist" / "half" / "plan.json").read_text())


def test_a_second_run_changes_nothing(run: Build, project: Path):
    run()
    before = stamps(project)
    report = run()
    assert statuses(report) == {"whole": "up-to-date", "half": "up-to-date"}
    assert stamps(project) == before
    half = report.entries[1]
    assert half.plan is not None
    assert half.plan.shape == "3x0.5"


def test_a_run_with_nothing_to_do_loads_no_torch(run: Build, project: Path):
    run()
    script = (
        "import sys; from amoeba_export.cli.app import main; code = main(['build', '--json'])\n"
        "print(code, *{'torch', 'transformers', 'onnx'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=project, capture_output=True, text=True, check=True)
    assert done.stderr == "0\n"
    assert [entry["status"] for entry in json.loads(done.stdout)["entries"]] == ["up-to-date", "up-to-date"]


def test_touching_one_entry_rebuilds_one(run: Build, project: Path):
    run()
    before = stamps(project / "dist" / "whole")
    (project / "amoeba.toml").write_text(HEAD + TWO.replace("3x0.5", "2x0.5"))
    assert statuses(run()) == {"whole": "up-to-date", "half": "built"}
    assert stamps(project / "dist" / "whole") == before
    assert read_manifest(project / "dist" / "half").shape.depth == 2


@pytest.mark.parametrize("damage", ["remove", "change", "add"])
def test_an_artifact_that_is_not_whole_is_built_again(damage: str, run: Build, project: Path):
    run()
    folder = project / "dist" / "half"
    if damage == "remove":
        shutil.rmtree(folder)
    elif damage == "change":
        (folder / "plan.json").write_text("{}")
    else:
        (folder / "notes.txt").write_text("mine")
    assert statuses(run()) == {"whole": "up-to-date", "half": "built"}
    verify_checksums(folder)


def test_one_failure_stops_no_other(run: Build, project: Path):
    failing = '[[build]]\nname = "deep"\nshape = "1x0.5"\n[[build]]\nname = "slow"\ntarget = "imaginary.toml"\n'
    (project / "amoeba.toml").write_text(HEAD + failing + 'latency = "1%"\n' + TWO)
    report = run()
    assert statuses(report) == {"deep": "failed", "slow": "failed", "whole": "built", "half": "built"}
    deep, slow = report.failed
    assert deep.error is not None
    assert (deep.error.kind, deep.error.exit_code) == ("UsageError", 2)
    assert deep.error.message == "The strategy does not know depth 1."
    assert slow.error is not None
    assert (slow.error.kind, slow.error.exit_code) == ("NothingFits", 4)
    assert report.exit_code == 2
    assert not (project / "dist" / "deep").exists()
    assert BuildReport.from_json(json.loads(report.to_text())) == report
    assert statuses(run()) == {"deep": "failed", "slow": "failed", "whole": "up-to-date", "half": "up-to-date"}


def test_plans_known_together_are_cut_in_one_pass(run: Build, project: Path, monkeypatch: pytest.MonkeyPatch):
    """Given shapes and searched ones: each tensor is read once for the first round of all four."""
    measured = '[[build]]\nname = "{0}"\ntarget = "imaginary.toml"\nlatency = "{0}%"\nformats = ["onnx"]\n'
    (project / "amoeba.toml").write_text(HEAD + TWO + measured.format(90) + measured.format(60))
    reads: Counter[str] = Counter()
    passes: list[int] = []
    make, open_stream = stream.Maker.make, stream.stream_subnets

    def counted(self, module):  # type: ignore[no-untyped-def]
        reads.update(f"{module.name}.{part}" for part in module.axes)
        return make(self, module)

    def opened(supernet, plans, **rest):  # type: ignore[no-untyped-def]
        passes.append(len(plans))
        return open_stream(supernet, plans, **rest)

    monkeypatch.setattr(stream.Maker, "make", counted)
    monkeypatch.setattr("amoeba_export.builds.rounds.stream_subnets", opened)
    report = run()
    assert report.exit_code == 0
    assert passes[0] == 4
    assert max(reads.values()) == len(passes)
    for entry in report.entries[2:]:
        assert entry.latency is not None
        assert entry.latency.limit_ms is not None
        assert entry.latency.actual_ms is not None
        assert entry.latency.actual_ms <= entry.latency.limit_ms
        assert entry.frontier is not None
        assert sum(one.chosen for one in entry.frontier.points) == 1
        (reference,) = entry.reference
        assert reference.keeps_budget is False


def test_a_plot_of_a_build(run: Build, project: Path, capsys: pytest.CaptureFixture[str]):
    measured = '[[build]]\nname = "{0}"\ntarget = "imaginary.toml"\nlatency = "{0}%"\nformats = ["onnx"]\n'
    (project / "amoeba.toml").write_text(HEAD + measured.format(90) + measured.format(60))
    assert main(["build", "--plot", "a.json", "--plot", "a.html"]) == 0
    found = Frontier.from_json(json.loads((project / "a.json").read_text()), where="a.json")
    assert [limit.label.split(",")[0] for limit in found.limits] == ["90: 90%", "60: 60%"]
    assert len([point for point in found.points if point.chosen]) == 2
    assert "90: 90%" in (project / "a.html").read_text()
    (project / "amoeba.toml").write_text(HEAD + TWO)
    assert main(["build", "--plot", "b.html"]) == 0
    assert "There is nothing to plot: this build searched nothing." in capsys.readouterr().err
    assert not (project / "b.html").exists()


def test_entries_at_once_give_the_same(run: Build, project: Path):
    run()
    alone = weights(project / "dist" / "half")
    shutil.rmtree(project / "dist")
    run(jobs=2)
    assert weights(project / "dist" / "half") == alone


def test_a_quality_floor(run: Build, project: Path):
    (project / "amoeba.toml").write_text(HEAD + TWO + "quality_floor = 5.5\n")
    report = run()
    assert statuses(report) == {"whole": "built", "half": "failed"}
    assert report.exit_code == 4
    assert report.entries[1].error is not None
    assert report.entries[1].error.message == "The subnet 3x0.5 has a loss of 6; the quality floor is 5.5."


def test_only_some(run: Build):
    assert statuses(run(only=("half",))) == {"whole": "skipped", "half": "built"}
    assert statuses(run()) == {"whole": "built", "half": "up-to-date"}
    with pytest.raises(UnknownName, match="Did you mean 'half'"):
        run(only=("hlaf",))


def test_locked_gives_the_same_bytes_without_search_and_measuring(
    run: Build, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = '[[build]]\nname = "fast"\ntarget = "imaginary.toml"\nlatency = "60%"\nformats = ["onnx"]\n'
    (project / "amoeba.toml").write_text(HEAD + TWO + measured)
    run()
    lock = (project / "amoeba.lock").read_text()
    before = {name: read_manifest(project / "dist" / name) for name in ("whole", "half", "fast")}
    shutil.rmtree(project / "dist")
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("amoeba_export.application.ways.fit_budget", None)
    monkeypatch.setattr("amoeba_export.application.ways.fit_plan", None)
    assert set(statuses(run(locked=True)).values()) == {"built"}
    for name, manifest in before.items():
        again = read_manifest(project / "dist" / name)
        assert (again.files, again.latency, again.quality, again.reference) == (
            manifest.files,
            manifest.latency,
            manifest.quality,
            manifest.reference,
        )
    assert [one.keeps_budget for one in before["fast"].reference] == [False]
    assert (project / "amoeba.lock").read_text() == lock
    assert set(statuses(run(locked=True)).values()) == {"up-to-date"}


def test_locked_refuses_changed_inputs(run: Build, project: Path):
    run()
    config = project / "model" / "config.json"
    config.write_text(config.read_text().replace("}", " }"))
    (project / "amoeba.toml").write_text(HEAD + TWO.replace("3x0.5", "2x0.5"))
    report = run(locked=True)
    assert [entry.error.message for entry in report.failed if entry.error] == [
        "The build 'whole' is locked and its inputs have changed: the model 'model' is another one.",
        "The build 'half' is locked and its inputs have changed: the model 'model' is another one; the settings in "
        "amoeba.toml are others.",
    ]
    assert report.exit_code == 3


def test_locked_without_a_lock(run: Build, project: Path):
    with pytest.raises(NotLocked, match="There is no lock"):
        run(locked=True)
    run(only=("whole",))
    report = run(locked=True)
    assert statuses(report) == {"whole": "up-to-date", "half": "failed"}
    assert report.exit_code == 3


def test_locked_notices_other_bytes(run: Build, project: Path):
    run()
    lock = project / "amoeba.lock"
    digest = weights(project / "dist" / "half")["safetensors/model.safetensors"]
    lock.write_text(lock.read_text().replace(digest, "0" * 64))
    report = run(locked=True)
    assert report.exit_code == 3
    assert report.entries[1].error is not None
    assert report.entries[1].error.message == (
        "The build 'half' has other weights than the lock says: safetensors/model.safetensors."
    )


def test_a_report_that_was_stopped_half_way_is_written_by_the_next_build(
    run: Build, project: Path, monkeypatch: pytest.MonkeyPatch
):
    names = {"build-report.json", "junit.xml", "summary.md", "report.html"}

    replace = Path.replace

    def stop(path: Path, target: Path) -> Path:
        if target.name == "summary.md":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    there = {path.name for path in (project / "dist").iterdir() if path.is_file()}
    assert there == {"build-report.json", "junit.xml"}
    assert set(statuses(run()).values()) == {"up-to-date"}
    assert {path.name for path in (project / "dist").iterdir() if path.is_file()} == names
    before = stamps(project)
    run()
    assert stamps(project) == before
    (project / "dist" / "junit.xml").unlink()
    run()
    assert (project / "dist" / "junit.xml").is_file()


def test_cache_info_and_prune(run: Build, project: Path, capsys: pytest.CaptureFixture[str]):
    for path in project.rglob("*"):
        os.utime(path, (1e9, 1e9))  # digests of files that were just written are not remembered
    run()
    assert main(["cache", "info", "--json"]) == 0
    kinds = {one["kind"]: one["num_entries"] for one in json.loads(capsys.readouterr().out)["kinds"]}
    assert kinds["sha256"] > 0
    assert main(["cache", "prune", "--older-than", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == 0
    assert main(["cache", "prune", "--kind", "nothing"]) == 2
    assert main(["cache", "prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] > 0
    assert set(statuses(run()).values()) == {"up-to-date"}


def test_the_command_reports_failures_and_their_code(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (project / "amoeba.toml").write_text(HEAD + '[[build]]\nname = "deep"\nshape = "1x0.5"\n')
    assert main(["build"]) == 2
    said = capsys.readouterr()
    assert [line.split() for line in said.out.splitlines()][-1] == ["deep", "-", "-", "-", "-", "-", "failed", "(2)"]
    assert said.err.splitlines()[-2:] == [
        "error: deep: The strategy does not know depth 1.",
        "  next:  Choose one of 2, 3, 4, or calibrate with more removed layers.",
    ]


@pytest.mark.parametrize("changed", ["search.txt", "width.txt"])
def test_every_data_file_of_a_recipe_is_an_input(run: Build, project: Path, changed: str):
    """`[width] data.file` too, as the shipped `paper.toml` has it."""
    data = 'file = "{}"\nwindow = 16\nsamples = 4\n'
    (project / "mine.toml").write_text(
        f"[data]\n{data.format('search.txt')}heldout = 2\n[width.data]\n{data.format('width.txt')}"
    )
    for name in ("search.txt", "width.txt"):
        (project / name).write_text("some words " * 100)
    head = '[model]\npath = "model"\n[defaults]\nformats = ["safetensors"]\nrecipe = "mine.toml"\n'
    (project / "amoeba.toml").write_text(head + '[[build]]\nname = "whole"\nshape = "4x1"\n')
    assert statuses(run()) == {"whole": "built"}
    assert statuses(run()) == {"whole": "up-to-date"}
    (project / changed).write_text("other words " * 100)
    report = run(locked=True)
    assert [entry.error.message for entry in report.failed if entry.error] == [
        "The build 'whole' is locked and its inputs have changed: the recipe 'mine, seed 0' is another one."
    ]
    assert statuses(run()) == {"whole": "built"}


def test_a_text_is_an_input_without_a_refit_too(run: Build, project: Path):
    """Integers may be chosen with it."""
    (project / "mine.txt").write_text("some words " * 100)
    (project / "amoeba.toml").write_text(f'{HEAD}calibration_data = ["mine.txt"]\n{TWO}')
    assert statuses(run(only=("half",)))["half"] == "built"
    assert statuses(run(only=("half",)))["half"] == "up-to-date"
    (project / "mine.txt").write_text("other words " * 100)
    report = run(only=("half",), locked=True)
    assert [entry.error.message for entry in report.failed if entry.error] == [
        "The build 'half' is locked and its inputs have changed: the text 'mine.txt' is another one."
    ]
    assert statuses(run(only=("half",)))["half"] == "built"


def test_what_an_older_algorithm_made_is_made_again_but_for_a_lock(run: Build, monkeypatch: pytest.MonkeyPatch):
    run(only=("half",))
    newer = [dataclasses.replace(one, version=one.version + (one is CHOOSING_INTEGERS)) for one in ARTIFACT]
    monkeypatch.setattr(inputs, "ARTIFACT", newer)
    assert statuses(run(only=("half",), locked=True))["half"] == "up-to-date"
    assert statuses(run(only=("half",)))["half"] == "built"
