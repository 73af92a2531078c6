"""`amoeba finetune` and `amoeba evaluate` through `main`, from a strategy to an exported artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from amoeba_export.cli.app import main
from amoeba_export.load import load_supernet, write_strategy
from tests.conftest import Run
from tests.finetune.models import char_tokenizer, random_strategy
from tests.tiny import save_tiny


@dataclass(frozen=True)
class Place:
    model: Path
    strategy: Path
    adapter: Path
    text: Path
    tasks: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A tiny model with a strategy, an adapter of a few steps, a text and a task."""
    root = tmp_path_factory.mktemp("evaluate")
    model = save_tiny(root / "tiny", "llama")
    char_tokenizer(model)
    supernet = load_supernet(str(model))
    write_strategy(random_strategy(supernet.architecture, model_id=supernet.identity), root / "strategy.safetensors")
    (root / "data.jsonl").write_text(
        "".join(json.dumps({"instruction": f"Say {i}.", "output": f"{i}!"}) + "\n" for i in range(20))
    )
    (root / "text.txt").write_text("A river runs to the sea. " * 20)
    (root / "task.jsonl").write_text(
        "".join(
            json.dumps({"context": f"{i} and", "choices": ["one", "many more"], "answer": i % 2}) + "\n"
            for i in range(6)
        )
    )
    place = Place(model, root / "strategy.safetensors", root / "adapter", root / "text.txt", root / "task.jsonl")
    words = ["finetune", model, "--strategy", place.strategy, "--data", root / "data.jsonl", "--out", place.adapter]
    words += [
        "--max-steps",
        3,
        "--batch-size",
        2,
        "--max-length",
        200,
        "--rank",
        2,
        "--experts",
        3,
        "--widths",
        "1,0.5",
    ]
    words += ["--depths", "3,2", "--prompt-format", "alpaca", "--learning-rate", "0.01", "--json"]
    assert main([str(word) for word in words]) == 0
    return place


def test_an_adapter_is_trained_and_said_so(place: Place) -> None:
    assert json.loads((place.adapter / "amoeba_adapter.json").read_text())["settings"]["max_steps"] == 3


def test_wrong_settings_are_named_with_their_options(amoeba: Callable[..., Run], place: Place, tmp_path: Path) -> None:
    common = ("finetune", place.model, "--strategy", place.strategy, "--data", place.text, "--out", tmp_path / "out")
    run = amoeba(*common, "--top-k", 9, "--dtype", "fp8")
    assert run.code == 2
    assert "There is no dtype named 'fp8'." in run.err
    assert "--top-k cannot be '9'." in run.err
    assert amoeba(*common, "--widths", "a,b").err == (
        "error: --widths cannot be 'a,b'.\n  next:  Give numbers with commas between them.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_grid_is_measured_into_the_adapter_and_drawn(
    amoeba: Callable[..., Run], place: Place, tmp_path: Path
) -> None:
    common = ("evaluate", place.model, "--strategy", place.strategy, "--adapter", place.adapter, "--text", place.text)
    common = (*common, "--window", 32, "--tasks", place.tasks, "--grid")
    run = amoeba(*common, "--depths", "4,2", "--plot", tmp_path / "front.png", "--json")
    assert run.code == 0, run.err
    data = json.loads(run.out)
    assert [entry["shape"] for entry in data["shapes"]] == ["4x1", "4x0.5", "2x1", "2x0.5"]
    assert json.loads((place.adapter / "quality.json").read_text()) == data
    assert data["shapes"][0]["prunable"] == 1.0
    assert data["shapes"][0]["tasks"]["task"]["num_items"] == 6
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    again = amoeba(*common, "--depths", "4,3,2")
    assert again.code == 0, again.err
    assert "Shape 3x1" in again.err
    assert "Shape 4x1" not in again.err
    assert "average" not in again.out  # of one task
    other = amoeba(*common, "--window", 16)
    assert other.code == 3
    assert "The result that is there was made for another model: window was 32, is 16." in other.err
    (place.adapter / "quality.json").unlink()


def test_an_artifact_scores_as_the_masked_supernet_does(
    amoeba: Callable[..., Run], place: Place, tmp_path: Path
) -> None:
    cut = ("--strategy", place.strategy, "--adapter", place.adapter, "--shape", "3x0.5")
    exported = amoeba("export", place.model, *cut, "--format", "safetensors,onnx", "--out", tmp_path / "artifact")
    assert exported.code == 0, exported.err
    measured = ("--text", place.text, "--window", 32, "--tasks", place.tasks, "--json")
    masked = json.loads(amoeba("evaluate", place.model, *cut, *measured).out)["shapes"][0]
    for container in ("safetensors", "onnx"):
        run = amoeba("evaluate", tmp_path / "artifact", "--format", container, *measured)
        assert run.code == 0, run.err
        dense = json.loads(run.out)["shapes"][0]
        assert dense["loss"] == pytest.approx(masked["loss"], abs=1e-5)
        assert dense["tasks"] == masked["tasks"]
        assert dense["num_params"] == masked["num_params"]
        assert dense["shape"] == "3x0.5"
    refused = amoeba("evaluate", tmp_path / "artifact", "--grid", *measured)
    assert refused.code == 2
    assert "An artifact has one shape, with everything in it." in refused.err
    absent = amoeba("evaluate", tmp_path / "artifact", "--format", "gguf", *measured)
    assert absent.err.startswith("error: There is no format in this artifact named 'gguf'.")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "There is nothing to measure.\n  next:  Give --text, --tasks, or both."),
        (("--text", "absent.txt"), 3, "The evaluation text was not found: absent.txt"),
        (("--text", "{text}", "--grid", "--shape", "2x1"), 2, "--grid and --shape exclude each other."),
        (("--text", "{text}", "--shape", "2x1"), 3, "A shape needs a strategy, which says what it keeps."),
        (("--text", "{text}", "--grid"), 3, "A shape needs a strategy, which says what it keeps."),
        (("--text", "{text}", "--window", "1"), 2, "--window cannot be '1'."),
        (("--text", "{text}", "--dtype", "int4"), 2, "There is no dtype named 'int4'."),
        (("--text", "{text}", "--out", "absent/q.json"), 3, "The folder for the result was not found: absent"),
    ],
)
def test_what_cannot_be_measured_is_explained(
    amoeba: Callable[..., Run], place: Place, words: tuple[str, ...], code: int, message: str
) -> None:
    run = amoeba("evaluate", place.model, *(word.format(text=place.text) for word in words))
    assert run.code == code
    assert run.err.startswith(f"error: {message}")
    assert run.out == ""
