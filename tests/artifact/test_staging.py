from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amoeba_export.artifact import Manifest, Staging, read_manifest, verify_checksums
from amoeba_export.errors import DamagedFile, InputError, NotReplaceable, OutputExists, ReadOnlyOutput
from tests.artifact.manifests import manifest


def publish(out: Path, content: str = "weights", *, force: bool = False) -> Manifest:
    with Staging(out, force=force) as staging:
        (staging.folder / "onnx").mkdir()
        (staging.folder / "onnx" / "model.onnx").write_text(content)
        return staging.publish(manifest())


def fail(staging: Staging, error: BaseException) -> None:
    with staging:
        (staging.folder / "half").write_text("x")
        raise error


def fail_inside(staging: Staging) -> None:
    with staging:
        raise DamagedFile(staging.folder / "onnx", "it is not ONNX")


def test_publishes_files_and_a_manifest_that_lists_them(tmp_path: Path) -> None:
    written = publish(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert read_manifest(tmp_path / "out") == written
    assert [file.path for file in written.files] == ["onnx/model.onnx", "provenance.json"]
    assert written.files[0].size_bytes == 7
    verify_checksums(tmp_path / "out")


def test_missing_parents_are_made(tmp_path: Path) -> None:
    publish(tmp_path / "a" / "[b]*" / "out [x]")
    assert (tmp_path / "a" / "[b]*" / "out [x]" / "amoeba.json").is_file()


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    with Staging(tmp_path / "a" / "b" / "out") as staging:
        (staging.folder / "half").write_text("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_nothing_and_passes_through(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        fail(Staging(tmp_path / "a" / "out"), error)
    assert list(tmp_path.iterdir()) == []


def test_clear_starts_over(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        (staging.folder / "too-slow").write_text("x")
        staging.clear()
        assert [file.path for file in staging.publish(manifest()).files] == ["provenance.json"]


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputExists) as caught:
        Staging(tmp_path)
    assert str(caught.value) == (
        f"The output '{tmp_path}' already exists.\n  next:  Choose another --out, or replace it with --force."
    )


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out) as staging:
        out.mkdir()
        (out / "mine").write_text("x")
        with pytest.raises(OutputExists):
            staging.publish(manifest())
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_force_replaces_an_artifact_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out", "old", force=True)
    publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_force_without_an_atomic_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "out", "old")
    monkeypatch.setattr(sys, "platform", "darwin")
    publish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_failed_replacement_keeps_the_old_artifact(tmp_path: Path) -> None:
    publish(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="late"):
        fail(Staging(tmp_path / "out", force=True), ValueError("late"))
    verify_checksums(tmp_path / "out")
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_never_replaces_what_is_not_an_artifact(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "home"
    if kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    else:
        out.write_text("x")
    with pytest.raises(NotReplaceable) as caught:
        Staging(out, force=True)
    assert str(caught.value) == (
        f"The output '{out}' is not an artifact, so --force does not replace it.\n"
        "  next:  Choose another --out, or remove it yourself."
    )


def test_a_read_only_parent_is_refused_for_root_too(tmp_path: Path) -> None:
    parent = tmp_path / "sealed"
    parent.mkdir(mode=0o555)
    with pytest.raises(ReadOnlyOutput) as caught:
        Staging(parent / "new" / "out")
    assert str(caught.value) == (
        f"The output '{parent}/new/out' cannot be written: {parent} is read-only.\n"
        "  next:  Choose an --out in a folder that you may write to."
    )
    assert list(parent.iterdir()) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReadOnlyOutput, match="is a file"):
        Staging(tmp_path / "file" / "out")


def test_a_disk_that_fills_up_is_an_input_error(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(InputError) as caught:
        fail(Staging(tmp_path / "o"), full)
    assert caught.value.what == "The disk is full."


def test_an_error_does_not_name_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile) as caught:
        fail_inside(Staging(tmp_path / "o"))
    assert caught.value.where == str(tmp_path / "o" / "onnx")


_HOLD = """
import sys, threading
from pathlib import Path
from amoeba_export.artifact import Staging
with Staging(Path(sys.argv[1])) as staging:
    (staging.folder / "half").write_text("x")
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_what_a_killed_run_left_is_swept_and_a_living_run_is_left_alone(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for run in runs:
            assert run.stdout is not None
            assert run.stdout.readline() == "ready\n"
        runs[0].send_signal(signal.SIGKILL)
        runs[0].wait()
        assert len(list(tmp_path.iterdir())) == 2
        with Staging(tmp_path / "other"):  # another output: not its business
            assert len(list(tmp_path.iterdir())) == 3
        with Staging(tmp_path / "out"):
            assert len(list(tmp_path.iterdir())) == 2
        assert [(path / "content" / "half").read_text() for path in tmp_path.iterdir()] == ["x"]
    finally:
        for run in runs:
            run.kill()
            run.communicate()


_PUBLISH = """
import sys, time
from pathlib import Path
from amoeba_export.artifact import Staging
from tests.artifact.manifests import manifest
with Staging(Path(sys.argv[1]), force=True) as staging:
    for i in range(20):
        (staging.folder / f"file{i}").write_bytes(bytes(50_000))
    print("ready", flush=True)
    staging.publish(manifest())
"""


def test_a_kill_while_publishing_leaves_a_whole_artifact_or_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for delay_ms in (0, 2, 5, 10, 40):
        run = subprocess.Popen(
            [sys.executable, "-c", _PUBLISH, str(out)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": "."},
        )
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(delay_ms / 1000)
        run.kill()
        run.communicate()
        if out.exists():
            assert len(verify_checksums(out).files) == 21  # with the provenance statement
    publish(out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
