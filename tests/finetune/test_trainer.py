"""Whole runs on a tiny model: what they write, how they go on, and that they learn."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from amoeba_export.errors import (
    InputError,
    NotReplaceable,
    OutputExists,
    Problems,
    UnsupportedError,
    UsageError,
)
from amoeba_export.finetune import LowRankSettings, ObjectiveSettings, Settings, finetune_adapter
from amoeba_export.finetune.adapter import WEIGHTS, read_weights
from amoeba_export.finetune.checkpoint import Run
from amoeba_export.finetune.model import SlicedSupernet
from amoeba_export.finetune.smol import TrainedLowRank, adapters_at
from amoeba_export.finetune.step import noise_scale
from amoeba_export.ir import Shape, SubnetPlan, Supernet
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet
from tests.finetune.models import char_tokenizer, tiny_supernet
from tests.finetune.test_model import randomised
from tests.tiny import save_tiny

SETTINGS = Settings(
    low_rank=LowRankSettings(rank=4, alpha=8.0, experts=3, top_k=2, gate_warmup=0.5),
    widths=(1.0, 0.75, 0.5),
    depths=(3, 2),
    max_steps=6,
    batch_size=2,
    max_length=48,
    learning_rate=1e-2,
    save_every=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("supernet") / "tiny", "llama")
    char_tokenizer(folder)
    return folder


@pytest.fixture
def supernet(folder: Path) -> Supernet:
    return tiny_supernet(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Sums that a tiny model learns something of: every answer repeats its question."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcd"), 6)) for _ in range(40)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"{word} {word} {word}"}) + "\n" for word in words))
    return path


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def curve(records: list[dict[str, Any]]) -> list[Any]:
    """What two runs must agree on: everything but the clock."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def assert_same_curve(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(curve(ours), curve(theirs), strict=True):
        assert [s["shape"] for s in mine["subnets"]] == [s["shape"] for s in other["subnets"]]
        for key in ("loss", "cross_entropy"):
            assert [s[key] for s in mine["subnets"]] == pytest.approx([s[key] for s in other["subnets"]], abs=1e-6)
        for key in ("step", "tokens", "learning_rate"):
            assert mine[key] == pytest.approx(other[key])


def test_a_run_leaves_an_adapter_folder_and_nothing_else(supernet: Supernet, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    report = finetune_adapter(supernet, data=data, out=out, settings=SETTINGS)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "amoeba_adapter.json",
        "loss.png",
        "training.jsonl",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "data.jsonl"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["use_moe_lora"], config["num_experts"], config["top_k"]) == (True, 3, 2)
    assert config["width_choice"] == "[1,0.75,0.5]"
    records = log(out)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(len(record["subnets"]) == 4 for record in records)
    assert report.steps == 6
    assert report.tokens == sum(record["tokens"] for record in records)
    assert set(report.losses) >= {Shape(4, 1.0), Shape(2, 0.5)}
    assert "depths 4, 3, 2; widths 1, 0.75, 0.5" in (out / "README.md").read_text()


def test_the_loss_falls_at_the_full_and_the_smallest_shape(supernet: Supernet, data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=40, schedule="constant")
    finetune_adapter(supernet, data=data, out=tmp_path / "adapter", settings=settings)
    records = log(tmp_path / "adapter")
    for i in (0, -1):
        losses = [record["subnets"][i]["cross_entropy"] for record in records]
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@pytest.mark.parametrize("mode", ["smol", "lora"])
def test_the_adapter_is_read_back_as_it_was_trained(
    supernet: Supernet, data: Path, tmp_path: Path, mode: Any, folder: Path
) -> None:
    """By our own reader for exports, at 10 random shapes: the gate and the mixture are the same, so are the logits."""
    low_rank_settings = dataclasses.replace(SETTINGS.low_rank, mode=mode)
    settings = dataclasses.replace(SETTINGS, low_rank=low_rank_settings, max_steps=3)
    finetune_adapter(supernet, data=data, out=tmp_path / "adapter", settings=settings)
    low_rank = TrainedLowRank(
        supernet.family, supernet.architecture, low_rank_settings, settings.gate_widths, generator=torch.Generator()
    )
    read_weights(tmp_path / "adapter" / WEIGHTS, low_rank)
    (adapter,) = load_supernet(str(folder), adapters=[tmp_path / "adapter"]).adapters
    assert adapter.width_choices == (settings.gate_widths if mode == "smol" else ())
    model, rng = SlicedSupernet(supernet), np.random.default_rng(1)
    input_ids_BT = torch.from_numpy(rng.integers(4, 90, (2, 12)))
    assert supernet.strategy is not None
    for _ in range(10):
        shape = Shape(int(rng.integers(1, 5)), round(float(rng.uniform(0.3, 1)), 2))
        plan = derive_plan(supernet.strategy, supernet.architecture, shape, CutRules(gate_widths=adapter.width_choices))
        cut = model.cut(plan)
        with torch.no_grad():
            trained = model.logits(model(input_ids_BT, cut=cut, low_rank=low_rank.at(plan)))
            read = model.logits(model(input_ids_BT, cut=cut, low_rank=adapters_at([adapter], plan)))
            plain = model.logits(model(input_ids_BT, cut=cut))
        assert (trained - read).abs().max() <= 1e-5
        assert (trained - plain).abs().max() > 1e-3


def test_a_plain_lora_is_a_peft_adapter(supernet: Supernet, data: Path, tmp_path: Path, folder: Path) -> None:
    settings = dataclasses.replace(SETTINGS, low_rank=dataclasses.replace(SETTINGS.low_rank, mode="lora"), max_steps=3)
    finetune_adapter(supernet, data=data, out=tmp_path / "adapter", settings=settings, shape=Shape(4, 1.0))
    records = log(tmp_path / "adapter")
    assert [[s["shape"] for s in record["subnets"]] for record in records] == [["4x1"]] * 3
    model = SlicedSupernet(supernet)
    low_rank = TrainedLowRank(
        supernet.family, supernet.architecture, settings.low_rank, (1.0,), generator=torch.Generator()
    )
    read_weights(tmp_path / "adapter" / WEIGHTS, low_rank)
    plan = SubnetPlan.full(supernet.architecture)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    input_ids_BT = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_PV = model.logits(model(input_ids_BT, cut=model.cut(plan), low_rank=low_rank.at(plan)))
        theirs_PV = theirs(input_ids_BT).logits.flatten(0, 1)
    assert (ours_PV - theirs_PV).abs().max() <= 1e-4


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    supernet: Supernet, data: Path, tmp_path: Path, folder: Path
) -> None:
    """SIGKILL after a checkpoint, in the middle of steps; gate noise, packing and epochs all go on in place."""
    whole = tmp_path / "whole"
    settings = dataclasses.replace(SETTINGS, max_steps=12, save_every=3)
    finetune_adapter(supernet, data=data, out=whole, settings=settings)
    killed = tmp_path / "killed"
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, threading, pathlib, dataclasses, torch\n"
        "torch.set_num_threads(1)\n"
        "import amoeba_export.finetune.trainer as trainer\n"
        "from tests.finetune.models import tiny_supernet\n"
        "from tests.finetune.test_trainer import SETTINGS\n"
        "step = trainer.Loop.optimizer_step\n"
        "def slow(self, index):\n"
        "    threading.Event().wait() if index > 4 else None\n"
        "    return step(self, index)\n"
        "trainer.Loop.optimizer_step = slow\n"
        "settings = dataclasses.replace(SETTINGS, max_steps=12, save_every=3)\n"
        "model, data, out = map(pathlib.Path, sys.argv[1:])\n"
        "trainer.finetune_adapter(tiny_supernet(model), data=data, out=out, settings=settings)\n"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, script, folder, data, killed],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        stdout=subprocess.DEVNULL,
    )
    training = tmp_path / "killed.training" / "training.jsonl"
    while not (training.exists() and training.read_text().count("\n") >= 5):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    checkpoints = sorted(path.name for path in (tmp_path / "killed.training" / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-000003"]
    with training.open("a") as file:
        file.write('{"step": 6, "cut off')  # as a line that the kill has cut
    with pytest.raises(UsageError, match="An unfinished run is at") as unfinished:
        finetune_adapter(supernet, data=data, out=killed, settings=settings)
    assert unfinished.value.next_step == "Go on with it with --resume, or start over with --force."
    other = dataclasses.replace(settings, learning_rate=0.5, seed=1)
    with pytest.raises(UsageError, match=r"learning_rate was 0.01, is 0.5; settings.seed was 0, is 1"):
        finetune_adapter(supernet, data=data, out=killed, settings=other, resume=True)
    finetune_adapter(supernet, data=data, out=killed, settings=settings, resume=True)
    assert_same_curve(log(killed), log(whole))
    ours, theirs = load_file(killed / WEIGHTS), load_file(whole / WEIGHTS)
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-6 for name in theirs)
    assert not (tmp_path / "killed.training").exists()


def test_two_processes_do_what_one_does_with_twice_the_micro_batches(
    supernet: Supernet, data: Path, tmp_path: Path, folder: Path
) -> None:
    """Full and smallest shape only, so that both draw the same shapes for the same rows.

    The processes then shard a supernet as docs/finetuning.md shows, and compare logits and gradients with a whole one.
    """
    settings = dataclasses.replace(SETTINGS, subnets=2, max_steps=3)
    alone = dataclasses.replace(
        settings, gradient_accumulation=2, low_rank=dataclasses.replace(settings.low_rank, gate_warmup=0.0)
    )
    finetune_adapter(supernet, data=data, out=tmp_path / "alone", settings=alone)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, pathlib, dataclasses, torch\n"
        "torch.set_num_threads(1)\n"
        "from amoeba_export.finetune import finetune_adapter\n"
        "from tests.finetune.models import tiny_supernet\n"
        "from tests.finetune.test_trainer import SETTINGS\n"
        "low_rank = dataclasses.replace(SETTINGS.low_rank, gate_warmup=0.0)\n"
        "settings = dataclasses.replace(SETTINGS, subnets=2, max_steps=3, low_rank=low_rank)\n"
        "model, data, out = map(pathlib.Path, sys.argv[1:])\n"
        "finetune_adapter(tiny_supernet(model), data=data, out=out, settings=settings)\n"
        "from tests.finetune.test_trainer import assert_sharding_changes_nothing\n"
        "assert_sharding_changes_nothing(tiny_supernet(model))\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    subprocess.run(
        [*command, folder, data, tmp_path / "together"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        cwd=root,
        check=True,
        capture_output=True,
    )
    ours, theirs = load_file(tmp_path / "together" / WEIGHTS), load_file(tmp_path / "alone" / WEIGHTS)
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-5 for name in theirs)
    assert [r["tokens"] for r in log(tmp_path / "together")] == [r["tokens"] for r in log(tmp_path / "alone")]


def assert_sharding_changes_nothing(supernet: Supernet) -> None:
    """Run by each of two processes."""
    assert supernet.strategy is not None
    plan = derive_plan(supernet.strategy, supernet.architecture, Shape(3, 0.5), CutRules(gate_widths=(1.0, 0.5)))
    low_rank = TrainedLowRank(
        supernet.family,
        supernet.architecture,
        LowRankSettings(rank=2),
        (1.0, 0.5),
        generator=torch.Generator().manual_seed(0),
    )
    low_rank = randomised(low_rank)
    input_ids_BT = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(3))
    results = []
    for shard in (False, True):
        model = SlicedSupernet(supernet)
        cut = model.cut(plan)
        for layer in model.layers if shard else ():
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        assert isinstance(model.layers[0].q_QD, DTensor) is shard
        logits_PV = model.logits(model(input_ids_BT, cut=cut, low_rank=low_rank.at(plan)))
        logits_PV.square().mean().backward()
        results.append([logits_PV.detach(), *(p.grad for p in low_rank.parameters() if p.grad is not None)])
        low_rank.zero_grad()
    assert len(results[0]) == len(results[1]) > 1
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"dtype": "bf16"},
        {"objective": ObjectiveSettings(kd_weight=0.5, temperature=2.0, balance=False, mask="unshifted")},
        {"packing": False},
        {"policy": "adaptive"},
        {"gradient_accumulation": 2},
        {"subnets": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_trains(supernet: Supernet, data: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=2, **change)
    finetune_adapter(supernet, data=data, out=tmp_path / "out", settings=settings)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_B." in name)


def test_an_output_that_is_there_is_replaced_only_by_force(supernet: Supernet, data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, max_steps=1)
    out = tmp_path / "adapter"
    finetune_adapter(supernet, data=data, out=out, settings=settings)
    with pytest.raises(OutputExists):
        finetune_adapter(supernet, data=data, out=out, settings=settings)
    finetune_adapter(supernet, data=data, out=out, settings=dataclasses.replace(settings, max_steps=2), force=True)
    assert len(log(out)) == 2
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(NotReplaceable):
        finetune_adapter(supernet, data=data, out=out, settings=settings, force=True)
    assert (out / "thesis.tex").exists()


def test_a_run_that_cannot_be_is_refused_before_any_work(supernet: Supernet, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="Fine-tuning needs a strategy"):
        finetune_adapter(dataclasses.replace(supernet, strategy=None), data=data, out=out)
    finetune_adapter(supernet, data=data, out=out, settings=dataclasses.replace(SETTINGS, max_steps=1))
    adapters = load_supernet(str(supernet.folder), adapters=[out]).adapters
    with pytest.raises(UnsupportedError, match="starts from a model without adapters"):
        finetune_adapter(dataclasses.replace(supernet, adapters=adapters), data=data, out=tmp_path / "o")
    assert not (tmp_path / "o.training").exists()


def test_a_loss_that_is_not_finite_stops_the_run(supernet: Supernet, data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, learning_rate=1e30, max_grad_norm=0.0, max_steps=4)
    with pytest.raises(UsageError, match=r"Training diverged: the loss of shape \dx[\d.]+ is nan") as caught:
        finetune_adapter(supernet, data=data, out=tmp_path / "out", settings=settings)
    assert caught.value.next_step == "Lower --learning-rate, or train in fp32."


def test_all_wrong_settings_are_reported_together() -> None:
    low_rank = LowRankSettings(top_k=9, targets=("q_proj", "kproj"))
    settings = Settings(low_rank=low_rank, max_steps=0, dtype="fp8", learning_rate=-1.0, widths=(2.0,))
    with pytest.raises(Problems) as caught:
        settings.check()
    assert [problem.what for problem in caught.value.problems] == [
        "There is no dtype named 'fp8'.",
        "There is no adapter target named 'kproj'. Did you mean 'k_proj'?",
        "--max-steps cannot be '0'.",
        "--top-k cannot be '9'.",
        "--learning-rate cannot be '-1'.",
        "--widths cannot be '2'.",
    ]


def test_gate_noise_falls_to_zero_over_the_warm_up() -> None:
    assert [noise_scale(step, 10, 0.4) for step in range(6)] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    assert noise_scale(0, 10, 0.0) == 0


def test_a_run_that_is_given_up_leaves_its_checkpoints_and_nothing_half_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "early", {}, resume=False, force=False)
    run.give_up()
    assert list(tmp_path.iterdir()) == []
    run = Run(tmp_path / "late", {}, resume=False, force=False)
    checkpoints = tmp_path / "late.training" / "checkpoints"
    for name in ("step-000003", ".staged"):
        (checkpoints / name).mkdir()
    run.give_up()
    assert [path.name for path in checkpoints.iterdir()] == ["step-000003"]
