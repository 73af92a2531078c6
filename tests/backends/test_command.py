"""Models timed by commands of the user's: what comes back, what is said when nothing does, what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from amoeba_export.backends import Subject, find_backend, measure_latency
from amoeba_export.backends.targets import graph_options, read_target
from amoeba_export.errors import CommandFailed, ForeignCode, InputError, TargetError, TargetUnavailable
from amoeba_export.ir import Latency, Progress, Target, Workload
from amoeba_export.load import load_supernet, write_strategy
from amoeba_export.profile import design_graphs, fit_cost_table
from tests.backends import stand_in
from tests.backends.models import FULL, MIXED, SHORT, TINY
from tests.conftest import Run
from tests.materialize.subnets import noise_strategy

STAND_IN = str(Path(stand_in.__file__))
PYTHON = [sys.executable, STAND_IN]
TEXT = {
    "decode": {"regex": r"Decode: (?P<value>\S+) (?P<unit>\S+)"},
    "prefill": {"regex": r"Prefill time: (?P<value>\S+) (?P<unit>\S+)"},
}


def bench(style: str, *more: str, model: str = "{safetensors}") -> list[str]:
    return [*PYTHON, "bench", style, model, "{prompt}", "{generate}", "{batch}", *more]


def target_of(options: Mapping[str, Any], *, container: str = "safetensors") -> Target:
    return Target(name="board", description="", backend="command", formats=(container,), options=options)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go. Nothing is left in it."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert [*folder.iterdir()] == []


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Files of known sizes in the place of an artifact's."""
    for container, name, size in (("safetensors", "model.safetensors", 300), ("gguf", "model.gguf", 500)):
        folder = tmp_path / "artifact" / container
        folder.mkdir(parents=True)
        (folder / name).write_bytes(bytes(1000 * size))
    return tmp_path / "artifact"


def measured(target: Target, *subjects: Subject, workload: Workload = SHORT, rounds: int = 1) -> list[Any]:
    return measure_latency(subjects, workload, target=target, rounds=rounds)


def cut(artifact: Path) -> Subject:
    return dataclasses.replace(FULL, artifact=artifact, label="cut")


@pytest.mark.parametrize(
    "options",
    [
        {"run": bench("text"), **TEXT},
        {
            "run": bench("json"),
            "decode": {"json_path": "decode.samples_us", "unit": "us"},
            "prefill": {"json_path": "prefill.s", "unit": "s"},
        },
        {
            "run": bench("json", "{out}/report.json"),
            "decode": {"json_path": "decode.samples_us", "unit": "us", "file": "{out}/report.json"},
            "prefill": {"json_path": "prefill.s", "unit": "s", "file": "{out}/report.json"},
        },
        {"run": bench("e2e"), "e2e": {"json_path": "latencies", "unit": "s"}},
        {"decode": {**TEXT["decode"], "run": bench("text")}, "prefill": {**TEXT["prefill"], "run": bench("text")}},
    ],
    ids=["text", "json", "file", "e2e", "two commands"],
)
def test_figures_become_latencies(options: dict[str, Any], artifact: Path) -> None:
    """300,000 bytes: 0.3 ms a step, of each of the prompt's tokens and sequences, too."""
    workload = Workload(prompt_tokens=8, generate_tokens=8, batch=2)
    (result,) = measured(target_of(options), cut(artifact), workload=workload, rounds=2)
    assert isinstance(result, Latency), result
    assert result.decode.p50_ms == pytest.approx(0.3)
    assert result.prefill.p50_ms == pytest.approx(0.3 * 8 * 2)
    assert result.decode.noise == pytest.approx(0)
    assert (result.source, result.workload, result.uncertainty) == ("measured", workload, None)
    assert [*map(list, result.rounds)] == [pytest.approx([0.3, 4.8])] * 2
    assert dict(result.device) == {"command": Path(sys.executable).name}


def test_every_placeholder(artifact: Path, tmp_path: Path) -> None:
    names = ("artifact", "safetensors", "gguf", "prompt", "generate", "batch", "dtype", "id", "run", "work", "out")
    script = tmp_path / "say.py"
    script.write_text("import sys\nopen(sys.argv[1], 'a').write('|'.join(sys.argv[2:]) + '\\n')\nprint('Decode: 1 us')")
    words = [sys.executable, str(script), str(tmp_path / "said"), *(f"{name}={{{name}}}" for name in names)]
    words.append("{{braces}}")
    figure = {"regex": "Decode: (.*) us", "unit": "us"}
    (result,) = measured(target_of({"run": words, "decode": figure, "prefill": figure}), cut(artifact), rounds=2)
    assert isinstance(result, Latency), result
    first, second = (line.split("|") for line in (tmp_path / "said").read_text().splitlines())
    said = dict(one.split("=") for one in first[:-1])
    assert first[-1] == "{braces}"
    assert said["artifact"] == str(artifact)
    assert said["safetensors"] == str(artifact / "safetensors")
    assert said["gguf"] == str(artifact / "gguf" / "model.gguf")
    assert [said[name] for name in ("prompt", "generate", "batch", "dtype", "run")] == ["8", "8", "1", "fp32", "1"]
    again = dict(one.split("=") for one in second[:-1])
    assert again["run"] == "2"
    assert again["out"] != said["out"]
    assert (again["id"], again["work"]) == (said["id"], said["work"])


@pytest.mark.parametrize("container", ["onnx", "safetensors"])
def test_bare_dims_get_random_weights(container: str) -> None:
    """The programme's time is the model's bytes: they are those of the dims, and gone after each run."""
    target = target_of({"run": bench("text", model=f"{{{container}}}"), **TEXT}, container=container)
    full, mixed = measured(target, FULL, MIXED)
    assert isinstance(full, Latency), full
    assert isinstance(mixed, Latency), mixed
    assert full.decode.p50_ms == pytest.approx(4 * FULL.dense.num_params / 1e6, rel=0.15)
    assert mixed.decode.p50_ms < full.decode.p50_ms


def test_random_safetensors_open_in_transformers(tmp_path: Path) -> None:
    """Its command loads the folder, counts its weights and runs it."""
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()\n"
        "print('weights', sum(weight.numel() for weight in model.parameters()), 'ns')\n"
    )
    figure = {"regex": r"weights (\d+) ns", "unit": "us"}
    options = {"run": [sys.executable, str(script), "{safetensors}"], "prompt_tokens": 8}
    subject = dataclasses.replace(FULL, dtype="bf16")
    (result,) = measured(target_of({**options, "decode": figure, "prefill": figure}), subject)
    assert isinstance(result, Latency), result
    assert result.decode.p50_ms == pytest.approx(FULL.dense.num_params / 1000)


def test_a_cost_table_of_a_command() -> None:
    """What the command says is linear in the model's bytes, and the table finds that."""
    target = target_of({"run": bench("text", model="{onnx}"), **TEXT}, container="onnx")
    graphs = design_graphs(TINY, num_graphs=10)
    subjects = [Subject(dense=graph, label="a graph") for graph in graphs]
    results = measured(target, *subjects)
    table = fit_cost_table(list(zip(graphs, results, strict=True)), target="board", dtype="fp32")
    (truth,) = measured(target, MIXED)
    assert table.latency(MIXED.dense).decode.p50_ms == pytest.approx(truth.decode.p50_ms, rel=0.05)


def test_models_take_turns(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "safetensors").mkdir(parents=True)
    (other / "safetensors" / "model.safetensors").write_bytes(bytes(1000))
    target = target_of({"run": bench("log", str(tmp_path / "log")), **TEXT})
    measured(target, cut(artifact), cut(other), rounds=3)
    order = [Path(line.split()[0]).parts[-2] for line in (tmp_path / "log").read_text().splitlines()]
    assert order == ["artifact", "other", "other", "artifact", "artifact", "other"]


# --- what goes wrong --------------------------------------------------------------------------------------------------

FAILURES = {
    "fail": ("it ended with code 1. It printed last:\n  | error: no space left\n  | error: cannot open the model"),
    "abort": "it was ended by SIGABRT",
    "silent": "it prints no decode where the target says (no line has ",
    "garbage": "it prints no decode where the target says (no line has ",
    "deep": "it prints no decode where the target says (no line has ",
    "wrong": "it prints no decode where the target says (it is 0 tok/s, which cannot be).",
    "endless": "it printed more than 16 MiB",
}


@pytest.mark.parametrize("style", FAILURES)
def test_a_command_that_gives_no_figure(style: str, artifact: Path) -> None:
    (result,) = measured(target_of({"run": bench(style), **TEXT}), cut(artifact))
    assert isinstance(result, CommandFailed)
    assert result.exit_code == 6
    assert result.what.startswith(f"Measuring cut on 'board' failed: {FAILURES[style]}")
    assert str(result.where) == f"the command {' '.join([*PYTHON, 'bench', style])} {artifact}/safetensors 8 8 1"
    assert result.next_step
    assert len(str(result)) < 3000


def test_one_that_hangs_is_killed_with_its_children(artifact: Path, tmp_path: Path) -> None:
    note = tmp_path / "processes"
    for timeout_s in (2, 20, 200, 2000):  # on a busy machine it does not get as far as to hang at once
        target = target_of({"run": bench("hang", str(note)), **TEXT, "timeout_s": timeout_s})
        (result,) = measured(target, cut(artifact), rounds=3)
        assert isinstance(result, CommandFailed)
        assert result.what.startswith(f"Measuring cut on 'board' failed: it took longer than {timeout_s} s.")
        if result.what.endswith(" It printed last:\n  | waiting for the device"):
            break
    assert result.next_step is not None
    assert "raise timeout_s in [options]" in result.next_step
    processes = [int(process) for process in note.read_text().split()]
    assert processes
    while any(is_running(process) for process in processes):  # it is killed, and dies when it gets to run
        time.sleep(0.05)


def is_running(process: int) -> bool:
    with contextlib.suppress(OSError):  # what init has not collected yet is dead as well
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_wrong_unit_is_seen_where_the_command_did_not_run_so_long(artifact: Path) -> None:
    (said,) = measured(target_of({"run": bench("seconds"), **TEXT}), cut(artifact))
    assert isinstance(said, CommandFailed)
    assert said.what.startswith("Measuring cut on 'board' failed: it says that decode took 300 ms, and ran for ")
    assert said.next_step == "Correct the unit in 'options.decode' of the target file."
    sure = {phase: {**figure, "unit": "ms"} for phase, figure in TEXT.items()}
    (told,) = measured(target_of({"run": bench("seconds"), **sure}), cut(artifact))
    assert isinstance(told, CommandFailed)
    assert "(it is in s, and the target says ms)" in told.what


def test_one_model_that_fails_does_not_spoil_the_others(artifact: Path, tmp_path: Path) -> None:
    gone = dataclasses.replace(FULL, artifact=tmp_path / "nowhere", label="gone")
    int4 = dataclasses.replace(FULL, dtype="int4", label="int4")
    bad, worse, good = measured(target_of({"run": bench("text"), **TEXT}), gone, int4, cut(artifact))
    assert isinstance(bad, TargetError)
    assert bad.what == f"The safetensors files of gone was not found: {tmp_path}/nowhere/safetensors"
    assert isinstance(worse, TargetError)
    assert "int4" in worse.what
    assert isinstance(good, Latency)


def test_a_program_that_is_not_made(artifact: Path) -> None:
    """Its path has a placeholder, so that it is missed when it is run."""
    (result,) = measured(target_of({"run": ["{work}/bench", "{safetensors}", "{prompt}"], **TEXT}), cut(artifact))
    assert isinstance(result, CommandFailed)
    assert result.what.endswith("/work/bench' cannot be started (No such file or directory).")


def test_a_disk_that_is_full(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_export.formats import onnx

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device", "model.onnx.data")

    monkeypatch.setattr(onnx, "write_random", full)
    target = target_of({"run": bench("text", model="{onnx}"), **TEXT}, container="onnx")
    (result,) = measured(target, FULL)
    assert isinstance(result, TargetError)
    assert result.what == "The files of full cannot be written here: No space left on device."


def test_a_gguf_is_made_from_dims() -> None:
    """All of it is there for the command: larger models take longer there."""
    target = target_of({"run": bench("text", model="{gguf}"), **TEXT}, container="gguf")
    whole, part = measured(target, FULL), measured(target, MIXED)
    assert isinstance(whole[0], Latency), whole
    assert isinstance(part[0], Latency), part
    assert whole[0].decode.p50_ms > FULL.dense.num_params * 4 / 1e6
    assert part[0].decode.p50_ms < whole[0].decode.p50_ms


def test_code_in_an_artifact_is_refused(artifact: Path) -> None:
    (artifact / "gguf" / "modeling.py").write_text("")
    words = bench("text", model="{artifact}")
    (result,) = measured(target_of({"run": words, **TEXT}), cut(artifact))
    assert isinstance(result, TargetError)
    with pytest.raises(ForeignCode) as caught:
        raise ForeignCode(artifact / "gguf", ["modeling.py"])
    assert result.what.split(":")[0] == caught.value.what.split(":")[0]


def test_a_file_that_is_not_written(artifact: Path) -> None:
    figures = {phase: {**figure, "file": "{out}/report"} for phase, figure in TEXT.items()}
    (result,) = measured(target_of({"run": bench("text"), **figures}), cut(artifact))
    assert isinstance(result, CommandFailed)
    assert "there is no file '{out}/report' to read decode from" in result.what


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"run": ["no-such-program", "{onnx}", "{prompt}"]}, "There is no program 'no-such-program' here"),
        (
            {"run": bench("text"), "describe": {"board": [sys.executable, "-c", "import sys; sys.exit('offline')"]}},
            "The command that tells its board failed, it ended with code 1: offline",
        ),
    ],
)
def test_a_target_that_is_not_there(options: dict[str, Any], reason: str) -> None:
    target = target_of({**options, **TEXT})
    availability = find_backend("command").check(target)
    assert (availability.ok, availability.reason) == (False, reason)
    assert availability.next_step
    with pytest.raises(TargetUnavailable, match="Target 'board' cannot be used: "):
        measured(target, FULL)


def test_what_the_device_says_of_itself() -> None:
    describe = {"board": [sys.executable, "-c", "print('warning\\nPixel 9\\n')"]}
    device = find_backend("command").describe(target_of({"run": bench("text"), **TEXT, "describe": describe}))
    assert device == {"command": Path(sys.executable).name, "board": "Pixel 9"}


def test_workloads_that_the_command_cannot_do(artifact: Path) -> None:
    fixed = target_of({"run": [*bench("text")[:5], "8", "8", "1"], "prompt_tokens": 8, **TEXT})
    (result,) = measured(fixed, cut(artifact))
    assert isinstance(result, Latency), result
    with pytest.raises(TargetError, match=r"The command of 'board' always reads 8 tokens, not 9\."):
        measured(fixed, cut(artifact), workload=Workload(prompt_tokens=9))
    with pytest.raises(TargetError, match=r"The command of 'board' runs one sequence, not 2\."):
        measured(fixed, cut(artifact), workload=dataclasses.replace(SHORT, batch=2))
    e2e = target_of({"run": bench("e2e"), "e2e": {"json_path": "latencies", "unit": "s"}})
    with pytest.raises(TargetError, match="one more is needed"):
        measured(e2e, cut(artifact), workload=dataclasses.replace(SHORT, generate_tokens=1))


# --- a device of its own ----------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device whose program `bench` writes its figures to a file."""
    folder = tmp_path / "device"
    folder.mkdir()
    program = folder / "bench"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" bench json "$@"\n')
    program.chmod(0o755)
    return folder


def over_adb(device: Path, **changes: Any) -> dict[str, Any]:
    adb = [*PYTHON, "adb", str(device)]
    file = "{out}/report.json"
    return {
        "push": [[*adb, "push", "{safetensors}", "{id}"]],
        "run": [*adb, "shell", "bench", "{id}", "{prompt}", "{generate}", "{batch}", "{id}/{run}.json"],
        "pull": [[*adb, "pull", "{id}/{run}.json", file]],
        "cleanup": [[*adb, "shell", "rm", "-rf", "{id}"]],
        "describe": {"shell": [*adb, "shell", "echo", "stand-in"]},
        "decode": {"json_path": "decode.samples_us", "unit": "us", "file": file},
        "prefill": {"json_path": "prefill.s", "unit": "s", "file": file},
        **changes,
    }


def test_push_run_pull_clean(device: Path, artifact: Path) -> None:
    """Each model is pushed once; the second run sees its own report beside the first one's."""
    first, second = measured(target_of(over_adb(device)), cut(artifact), FULL, rounds=2)
    assert isinstance(first, Latency), first
    assert isinstance(second, Latency), second
    assert first.rounds[0][0] == pytest.approx(0.3)
    assert first.prefill.p50_ms == pytest.approx(2.4, rel=0.01)
    assert first.device["shell"] == "stand-in"
    assert [path.name for path in device.iterdir()] == ["bench"]


@pytest.mark.parametrize("broken", ["push", "run", "pull"])
def test_the_device_is_clean_whatever_breaks(broken: str, device: Path, artifact: Path) -> None:
    options = over_adb(device)
    bad = [*PYTHON, "adb", str(device), "shell", "echo", "oops", "{id}", ">&2", "&&", "false"]
    if broken == "push":
        options["push"] = [*options["push"], bad]
    elif broken == "pull":
        options["pull"] = [bad]
    else:
        options["run"] = [*bad, "{prompt}"]
    (result,) = measured(target_of(options), cut(artifact))
    assert isinstance(result, CommandFailed)
    assert "failed: it ended with code 1. It printed last:\n  | oops amoeba-" in result.what
    assert [path.name for path in device.iterdir()] == ["bench"]


def test_an_interrupt_cleans_up(device: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amoeba_export.backends.command.timed import TimedModel

    def interrupted(model: TimedModel) -> None:
        assert len([*device.iterdir()]) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(TimedModel, "time", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(target_of(over_adb(device)), cut(artifact))
    assert [path.name for path in device.iterdir()] == ["bench"]


def test_a_cleanup_that_fails_is_said(device: Path, artifact: Path) -> None:
    class Warnings:
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, message: str) -> None: ...

        def warn(self, message: str) -> None:
            self.said.append(message)

        @contextlib.contextmanager
        def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
            yield lambda steps: None

    options = over_adb(device, cleanup=[[*PYTHON, "adb", str(device), "shell", "exit", "7"]])
    listener: Progress = Warnings()
    (result,) = measure_latency([cut(artifact)], SHORT, target=target_of(options), rounds=1, progress=listener)
    assert isinstance(result, Latency)
    (left,) = [path.name for path in device.iterdir() if path.name != "bench"]
    assert listener.said == [  # type: ignore[attr-defined]
        f"Cleaning up cut failed, look for '{left}': Measuring cut on 'board' failed: it ended with code 7."
    ]


def test_nothing_of_an_artifact_reaches_a_shell(device: Path, artifact: Path, tmp_path: Path) -> None:
    """`adb shell` is a shell: an artifact's folder is called what it is called."""
    evil = tmp_path / "a $(touch pwned) `touch pwned` ; touch pwned #"
    artifact.rename(evil)
    adb = [*PYTHON, "adb", str(device), "shell", "bench"]
    options = {
        "run": [*adb, "{safetensors}", "{prompt}", "{generate}", "{batch}"],
        "decode": {"json_path": "decode.samples_us", "unit": "us"},
        "prefill": {"json_path": "prefill.s", "unit": "s"},
    }
    subject = cut(evil)
    (result,) = measured(target_of(options), subject)
    assert isinstance(result, Latency), result
    assert result.decode.p50_ms == pytest.approx(0.3)
    (refused,) = measured(target_of(options), dataclasses.replace(subject, dtype="$(touch pwned)"))
    assert isinstance(refused, TargetError)
    assert not list(tmp_path.rglob("pwned"))


# --- the target file --------------------------------------------------------------------------------------------------

HEAD = 'description = "mine"\nbackend = "command"\n[options]\n'
FIGURES = '[options.decode]\nregex = "(.)"\nunit = "ms"\n[options.prefill]\nregex = "(.)"\nunit = "ms"\n'


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (
            'run = ["b", "{artefact}", "{prompt}"]\n' + FIGURES,
            [
                "options.run.1: there is no placeholder {artefact}. Did you mean 'artifact'? The known ones are "
                "{artifact}, {safetensors}, {onnx}, {gguf}, {prompt}, {generate}, {batch}, {dtype}, {id}, {run}, "
                "{work}, {out}; write {{ and }} for braces"
            ],
        ),
        (
            "run = \"adb shell 'my bench' {onnx}\"\n" + FIGURES,
            ['options.run: a command is a list of words, not one text: ["adb", "shell", "my bench", "{onnx}"]'],
        ),
        (
            'rum = ["b"]\n[options.decode]\nregx = "x"\nunit = "msec"\n',
            [
                "options.decode.unit: input should be 'us', 'ms', 's' or 'tok/s', not 'msec'",
                "options.decode.regx: there is no such key. Did you mean 'regex'?",
                "options.rum: there is no such key. Did you mean 'run'?",
            ],
        ),
        (
            'run = ["b", "{", "{onnx}"]\n' + FIGURES,
            ["options.run.1: '{' has a single brace; write {{ or }} for a brace"],
        ),
        ('run = ["b", "{onnx}"]\n', ["options: it needs the tables decode and prefill, or e2e alone"]),
        (FIGURES, ["options: there is no command that prints decode: give run"]),
        (
            'run = ["b", "{onnx}"]\n' + FIGURES,
            ["options: the command needs {prompt}, or, where it has a prompt of its own, prompt_tokens"],
        ),
        (
            'run = ["b", "{prompt}"]\n' + FIGURES,
            ["options: no command has {artifact}, {safetensors}, {onnx} or {gguf}: what would it time?"],
        ),
        (
            'run = ["b", "{onnx}", "{prompt}"]\n[options.e2e]\nregex = "(.)"\nunit = "s"\n',
            ["options: e2e is run for one token and for all, so its command needs {generate}"],
        ),
        (
            'run = ["b", "{onnx}", "{prompt}"]\npush = [["cp", "{onnx}", "{out}"]]\n' + FIGURES,
            ["options: {out} and {run} belong to one run, push and cleanup to none: use {work} and {id} there"],
        ),
        (
            'run = ["b", "{onnx}", "{prompt}"]\ndescribe = { os = ["uname", "{id}"] }\n' + FIGURES,
            ["options.describe.os.1: '{id}' has a placeholder, and this command runs without a model"],
        ),
    ],
)
def test_mistakes_of_a_target_file(text: str, problems: list[str], tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(HEAD + text)
    with pytest.raises(InputError) as caught:
        read_target(path)
    assert caught.value.what.splitlines()[1:] == [f"  - {problem}" for problem in problems]


def test_graphs_are_spelled_as_the_target_says() -> None:
    options = {"run": bench("text", model="{onnx}"), **TEXT}
    assert graph_options(target_of(options), "fp16") == {"dialect": "ort"}
    assert graph_options(target_of({**options, "dialect": "standard"}), "fp16") == {"dialect": "standard"}


def test_the_example_of_the_docs_is_a_target(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    path = tmp_path / "phone.toml"
    path.write_text(page.split("## Any runtime, through a command")[1].split("```toml\n")[1].split("```")[0])
    assert read_target(path).backend == "command"


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "targets").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_the_examples_are_targets(path: Path) -> None:
    target = read_target(path)
    assert target.backend == "command"
    assert target.sources
    check = find_backend("command").check(target)
    assert check.ok or "there is no program" in check.reason.lower()


def test_there_are_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["adb-llamacpp", "edgellm", "vllm"]


# --- from end to end --------------------------------------------------------------------------------------------------


def test_an_export_keeps_its_budget(amoeba: Callable[..., Run], tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A cost table of the command, a cut, and the cut timed by the command beside the uncut model."""
    words = ", ".join(f"'{word}'" for word in bench("json", "{out}/report", model="{onnx}"))
    path = tmp_path / "board.toml"
    path.write_text(
        f'description = "mine"\nbackend = "command"\nformats = ["onnx"]\nalign = 8\n[options]\nrun = [{words}]\n'
        '[options.decode]\njson_path = "decode.samples_us"\nunit = "us"\nfile = "{out}/report"\n'
        '[options.prefill]\njson_path = "prefill.s"\nunit = "s"\nfile = "{out}/report"\n'
    )
    supernet = load_supernet(str(tiny_dirs["llama"]))
    strategy = dataclasses.replace(noise_strategy(supernet.architecture), model_id=supernet.identity)
    write_strategy(strategy, tmp_path / "strategy.safetensors")
    run = amoeba(
        *("export", tiny_dirs["llama"], "--strategy", tmp_path / "strategy.safetensors", "--target", path),
        *("--latency", "80%", "--prompt", 8, "--generate", 8, "--out", tmp_path / "out"),
    )
    assert run.code == 0, run.err
    latency = json.loads((tmp_path / "out" / "amoeba.json").read_text())["latency"]
    assert latency["source"] == "measured"
    assert 0.9 * latency["budget_ms"] < latency["measured_ms"]["p50"] <= latency["budget_ms"]
    files = stand_in.bytes_of(tmp_path / "out" / "onnx")
    assert latency["measured_ms"]["p50"] == pytest.approx(files / 1e6)


# --- on the screen ----------------------------------------------------------------------------------------------------


def test_what_a_device_prints_is_safe_on_the_screen(
    amoeba: Callable[..., Run], tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    words = ", ".join(f"'{word}'" for word in bench("garbage"))
    path = tmp_path / "board.toml"
    path.write_text(
        f'description = "mine"\nbackend = "command"\nformats = ["safetensors"]\n[options]\nrun = [{words}]\n' + FIGURES
    )
    out = tmp_path / "table.json"
    run = amoeba("profile", tiny_dirs["llama"], "--target", path, "--out", out, "--prompt", 8, "--generate", 8)
    assert run.code == 6
    assert "\x1b" not in run.err and "\u202e" not in run.err
    assert "where: the command " in run.err
    assert "\n  next:  " in run.err
    assert not out.exists()
