"""One valid file of every kind that amoeba reads: what the fuzzers start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from amoeba_export.artifact import list_files
from amoeba_export.builds.entry import LockedEntry
from amoeba_export.builds.lock import write_lock
from amoeba_export.builds.outcome import (
    BuildReport,
    EntryOutcome,
    ErrorRecord,
    LatencyFigures,
    QualityFigures,
)
from amoeba_export.builds.plan_record import PlanRecord
from amoeba_export.evaluate import QualityFile, ShapeQuality, TaskScore
from amoeba_export.ir import Architecture, InputId, Shape, SubnetPlan, Workload
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet, write_strategy
from amoeba_export.load.refit import write_refit
from amoeba_export.materialize.walk import subnet_specs
from amoeba_export.profile import design_graphs, fit_cost_table, write_table
from tests.artifact.manifests import manifest
from tests.formats.bpe import save_bpe
from tests.load.gguf_files import write_gguf
from tests.profile.machines import Machine
from tests.search.strategies import graded_strategy, imported_strategy
from tests.tiny import save_tiny, tiny_model

GOLDENS = Path(__file__).parent.parent / "goldens" / "C"
MODEL = InputId(role="model", id="tiny", sha256="ab" * 32)


def make_valid(root: Path) -> None:
    """Write a folder per kind below `root`. Seeded: the same files every time."""
    save_tiny(root / "config")
    # A cost table, a plan and a strategy name dims, so all of them are of the same tiny model.
    architecture = load_supernet(str(root / "config"), cache_dir=root / "cache").architecture
    (root / "config" / "generation_config.json").write_text('{"eos_token_id": [1, 2], "do_sample": true, "top_k": 5}')
    save_bpe(save_tiny(root / "tokenizer"))
    (root / "gguf").mkdir()
    write_gguf(root / "gguf" / "model.gguf")
    for kind in ("weights", "index"):
        shutil.copytree(root / "config", root / kind)
    tiny_model().save_pretrained(root / "index", max_shard_size="100KB")
    (root / "index" / "model.safetensors").unlink()
    _adapters(root, architecture)
    _plans(root, architecture)
    _records(root)
    _settings(root)


def _adapters(root: Path, architecture: Architecture) -> None:
    folder = root / "adapter"
    folder.mkdir()
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(architecture.num_layers)]
    out, inner = architecture.axis_size("query"), architecture.hidden_size
    weights = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, inner) for name in modules}
    weights |= {f"base_model.model.{name}.lora_B.weight": torch.ones(out, 4) for name in modules}
    save_file(weights, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "rank_pattern": {"layers.9.q_proj": 2}, "alpha_pattern": {"k_proj": 16}, "bias": "none", "use_rslora": False,
        "use_dora": False, "layers_to_transform": None, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pickled = root / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "adapter_config.json", pickled)
    torch.save(weights, pickled / "adapter_model.bin")
    shutil.copytree(GOLDENS / "adapter", root / "smol")
    shutil.copytree(GOLDENS / "base", root / "smol-model")
    (root / "npy").mkdir()
    shutil.copy(GOLDENS / "dp_selection_strategy.npy", root / "npy")


def _plans(root: Path, architecture: Architecture) -> None:
    strategy = graded_strategy(load_supernet(str(root / "config"), cache_dir=root / "cache"))
    (root / "strategy").mkdir()
    write_strategy(strategy, root / "strategy" / "strategy.safetensors")
    (root / "fixed").mkdir()
    write_strategy(imported_strategy(architecture, removed=2), root / "fixed" / "strategy.safetensors")
    plan = derive_plan(strategy, architecture, Shape(3, 0.5), CutRules(policy="adaptive"))
    (root / "plan").mkdir()
    (root / "plan" / "plan.json").write_text(json.dumps(plan.to_json()))
    machine, workload = Machine(), Workload()
    graphs = design_graphs(architecture, align=1)
    table = fit_cost_table([(one, machine.measure(one, workload)) for one in graphs], target="cpu", dtype="fp32")
    _refit(root, plan)
    (root / "table").mkdir()
    write_table(table, root / "table" / "table.json")
    _artifact(root / "artifact", plan)
    latency = manifest().to_json()["latency"]
    entry = LockedEntry(
        name="a", fingerprint="cd" * 32, target="cpu", dtype="fp32", plan=plan, inputs=(MODEL,),
        latency=json.loads(json.dumps(latency)), quality={"loss": 3.0}, files={"onnx/model.onnx": "ef" * 32},
    )  # fmt: skip
    (root / "lock").mkdir()
    write_lock(root / "lock" / "amoeba.lock", [entry])
    _report(root / "report", plan, architecture)


def _refit(root: Path, plan: SubnetPlan) -> None:
    """Zeros for every writer into the residual stream of the plan's cut."""
    supernet = load_supernet(str(root / "config"), cache_dir=root / "cache")
    specs = [spec for spec in subnet_specs(supernet, plan) if ".o_proj." in spec.name or ".down_proj." in spec.name]
    facts = {
        "geometry": plan.geometry, "model_id": supernet.identity, "adapters": [], "kind": "refit",
        "settings": {"recipe": "fast", "tokens": 256, "seed": 0},
        "losses": {"text": {"full": 3.0, "cut": 4.0, "refit": 3.5}},
    }  # fmt: skip
    zeros = [(spec.name, torch.zeros(spec.shape)) for spec in specs]
    write_refit(root / "refit" / "refit.safetensors", facts, specs, zeros, dtype=torch.float32)


def _artifact(folder: Path, plan: SubnetPlan) -> None:
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"\x08\x0a")
    made = manifest()
    (folder / "provenance.json").write_text(made.provenance(list_files(folder)))
    (folder / "amoeba.json").write_text(made.with_files(list_files(folder)).to_text())


def _report(folder: Path, plan: SubnetPlan, architecture: Architecture) -> None:
    folder.mkdir()
    built = EntryOutcome(
        name="a", status="built", target="cpu", dtype="fp32", out="dist/a", formats=("onnx",), inputs=(MODEL,),
        latency=LatencyFigures(
            metric="decode", percentile=50, budget="80%", limit_ms=10.0, predicted_ms=9.5, uncertainty=0.1,
            measured_ms={"p50": 9.0, "p90": 9.9}, full_ms=12.0,
        ),
        quality=QualityFigures(metric="loss", value=3.0, full=2.5, floor=4.0),
        plan=PlanRecord.of(plan, architecture),
    )  # fmt: skip
    failed = EntryOutcome(
        name="b", status="failed", error=ErrorRecord(kind="InputError", message="no", where="x", exit_code=3)
    )
    report = BuildReport(
        config="amoeba.toml", started="2026-01-01T00:00:00+00:00", seconds=4.5, engine="local", locked=False,
        tool={"amoeba": "0.1.0"}, entries=(built, failed),
    )  # fmt: skip
    (folder / "build-report.json").write_text(report.to_text())


def _records(root: Path) -> None:
    for kind in ("quality", "documents", "choices", "training", "tasks"):
        (root / kind).mkdir()
    score = TaskScore(accuracy=0.5, accuracy_norm=0.6, score=0.5, stderr=0.1, num_items=10)
    shapes = tuple(
        ShapeQuality(shape=Shape.parse(shape), num_params=size, prunable=0.5, loss=loss, perplexity=9.0,
                     tasks={"t": score})
        for shape, size, loss in (("4x1", 100, 2.0), ("3x0.5", 50, 3.0))
    )  # fmt: skip
    subject = {"model": "tiny", "inputs": {"model tiny": "ab" * 32}, "policy": "uniform"}
    QualityFile(subject=subject, measured={"window": 64}, shapes=shapes).write(root / "quality" / "quality.json")
    item = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    lines = {
        "documents": [{"text": "One text."}, {"text": "Another."}],
        "choices": [item, item],
        "training": [{"instruction": "Say it.", "output": "It."}, {"text": "All of it."}],
        "tasks": [item, {"context": "Is it", "choices": ["so", "not"], "answer": 0}],
    }
    for kind, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (root / kind / "data.jsonl").write_text(text)


def _settings(root: Path) -> None:
    texts = {
        "recipe/recipe.toml": 'description = "x"\n[data]\nfile = "data.jsonl"\nwindow = 64\nsamples = 8\n'
        '[depth]\nmax_removed = 0.25\nbeam = 2\n[width]\nmetric = "wanda"\n[quality]\nwidths = [1.0, 0.5]\n',
        "target/target.toml": 'description = "x"\nbackend = "onnxruntime"\naliases = ["y"]\nalign = 8\n'
        "memory_limit_mb = 512.5\n[options]\nthreads = 2\n",
        "recorded/target.toml": 'description = "x"\nbackend = "recorded"\n[options]\ntable = "table.json"\n',
        "refitrecipe/recipe.toml": 'description = "x"\ntokens = 512\nstrengths = [0.1, 1.0]\n[[mix]]\n'
        'file = "data.jsonl"\nshare = 0.5\n[[other]]\nfile = "data.jsonl"\nfields = ["text"]\n',
        "tasktoml/tasks.toml": '[[task]]\nname = "a"\nfile = "data.jsonl"\nprompt = "{question} {choices[0]}"\n'
        'metric = "accuracy_norm"\n[[task]]\nfile = "data.jsonl"\nstyle = "lettered"\nname = "b"\n',
        "build/amoeba.toml": 'out = "dist"\n[model]\npath = "model"\n[workload]\nprompt_tokens = 32\n[defaults]\n'
        'target = "cpu"\nformats = ["onnx"]\npercentile = 90\n[[build]]\nname = "a"\nlatency = "80%"\n'
        'memory = "900MB"\n[[build]]\nname = "b"\nshape = "3x0.5"\nseed = 3\n',
    }
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    item = {"question": "Which?", "choices": ["a", "b"], "answer": 1}
    (root / "tasktoml" / "data.jsonl").write_text(json.dumps(item) + "\n")
    for kind in ("recipe", "refitrecipe"):
        (root / kind / "data.jsonl").write_text('{"text": "One text."}\n')
    (root / "build" / "model").mkdir()
