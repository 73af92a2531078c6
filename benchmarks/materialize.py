"""What a subnet of a 7B model costs to write, beside `cp`, peft and mergekit: wall time, time to disk, peak memory.

    python -m benchmarks.materialize --work DIR [--tasks cut,merge,depth] [--rounds 1] [--layers 32] [--shape 24x0.75]
                                     [--mergekit PATH] [--json FILE] [--clean]

`--work` gets, once, a checkpoint of random bf16 weights with the dims of Llama-2-7B (13.5 GB in shards of 5 GB), a
mixture of LoRAs (SMoL, rank 64, 5 experts, 2 used, all linear layers, fp32, 3.2 GB), a plain LoRA of the same rank and
a strategy. Nothing here can do all that a cut does, so there are three tasks, each with ours beside what a user would
take instead for the comparable part:

    cut     24x0.75 with SMoL      `cp` of as many bytes as come out, after reading the input once
    merge   32x1 with a plain LoRA peft's merge_and_unload and save_pretrained, which builds the model
    depth   24x1 without adapter   mergekit's passthrough with --lazy-unpickle; left out where `--mergekit` is not found

Each is a process of its own; contenders take turns, `--rounds` times. Before each, all files are written back and
dropped from the page cache (posix_fadvise), so that each reads from the disk. Reported per contender, as medians over
all runs recorded in `--work` (runs.jsonl; delete it to begin anew):

    wall      from start to exit, imports included
    on disk   the same and until every byte is flushed (fsync)
    peak      resident memory as the kernel counts it (VmHWM; ru_maxrss where that is not told): mapped input is in it
    anon      the peak of the memory that is no file's (RssAnon, polled), where the system tells

Ours is load, plan, materialize and write as `export` does them. Not in it: the digest of the input, taken once a model
and remembered; digests of the output, printed apart; verification, which runs the uncut model, and measuring.
About 35 GB of disk are in use at most. A smaller checkpoint to try it: `--layers 4 --shape 3x0.75`.
"""
# Long on purpose: one script, read from top to bottom.

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amoeba_export.artifact.checksums import list_files
from amoeba_export.formats.shards import MAX_SHARD_BYTES, SafetensorsWriter
from amoeba_export.formats.write import write_formats
from amoeba_export.ir import Architecture, Importance, Shape, Strategy, SubnetPlan, TensorSpec
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet, write_strategy
from amoeba_export.load.families import expected_weights, read_architecture
from amoeba_export.materialize import materialize_subnet
from benchmarks.process import run_process

RANK, EXPERTS, TOP_K, WIDTHS = 64, 5, 2, (1.0, 0.875, 0.75, 0.625)
GATE = 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Run:
    """One contender once. Seconds and MB."""

    task: str
    contender: str
    wall_s: float
    on_disk_s: float
    peak_mb: float
    anon_mb: float
    output_bytes: int
    digests_s: float | None = None
    phases_s: Mapping[str, float] | None = None


# --- inputs


def make_inputs(work: Path, num_layers: int) -> None:
    """Everything that is not there yet."""
    config = CONFIG | {"num_hidden_layers": num_layers}
    architecture, file = read_architecture(config, where=work / "model" / "config.json")
    shapes = expected_weights(file.family, architecture)
    if not (work / "model" / "config.json").is_file():
        write_random(work / "model", shapes, torch.bfloat16)
        (work / "model" / "config.json").write_text(json.dumps(config, indent=2))
    linears = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if "_proj." in name}
    common = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": [*LINEARS]}
    mixture = {"use_moe_lora": True, "num_experts": EXPERTS, "top_k": TOP_K, "width_choice": "[1,7/8,3/4,5/8]"}
    gate_in = num_layers + len(WIDTHS)
    router = {
        "topkroute_linear.0.weight": (GATE, gate_in),
        "topkroute_linear.0.bias": (GATE,),
        "topkroute_linear.1.weight": (EXPERTS, GATE),
        "topkroute_linear.1.bias": (EXPERTS,),
        "noise_linear.weight": (EXPERTS, gate_in),
        "noise_linear.bias": (EXPERTS,),
    }
    gate = {f"base_model.lora_sparsemoe.router.{name}": shape for name, shape in router.items()}
    for name, settings, suffixes in (
        ("smol", common | mixture, [f".{expert}.weight" for expert in range(EXPERTS)]),
        ("lora", common, [".weight"]),
    ):
        if not (work / name / "adapter_config.json").is_file():
            weights = dict(gate) if name == "smol" else {}
            for module, (out, inner) in linears.items():
                for end in suffixes:
                    weights[f"base_model.model.{module}.lora_A{end}"] = (RANK, inner)
                    weights[f"base_model.model.{module}.lora_B{end}"] = (out, RANK)
            write_random(work / name, weights, torch.float32)
            (work / name / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    if not (work / "strategy.safetensors").is_file():
        write_strategy(random_strategy(architecture), work / "strategy.safetensors")


def write_random(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Weights between 2^-7 and 2^-3, signs random: one random block, read from another place for each weight."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    if dtype is torch.bfloat16:
        bits = torch.from_numpy(generator.integers(0, 1 << 16, 160 << 20, dtype=np.uint16) & 0x81FF | 0x3C00)
    else:
        sign_and_mantissa = generator.integers(0, 1 << 32, 8 << 20, dtype=np.uint32) & 0x81FFFFFF
        bits = torch.from_numpy(sign_and_mantissa | 0x3C000000)
    block = bits.view(dtype)
    specs = [TensorSpec(name=name, shape=shape) for name, shape in shapes.items()]
    limit = MAX_SHARD_BYTES if dtype is torch.bfloat16 else 1 << 62
    writer = SafetensorsWriter(folder, specs, zeros=(), dtype=dtype, limit=limit)
    for spec in specs:
        size = int(np.prod(spec.shape))
        start = int(generator.integers(0, len(block) - size))
        writer.accept(spec.name, block[start : start + size].view(spec.shape))
    writer.close()
    if dtype is torch.float32:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def random_strategy(architecture: Architecture) -> Strategy:
    """Random importances and input means. Every depth leaves out layers after the first."""
    noise = np.random.default_rng(0)
    num_layers, num_heads, ffn = architecture.num_layers, architecture.num_heads, architecture.ffn_size
    return Strategy(
        model_id=None,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        ffn_size=ffn,
        depth={m: (1,) + (0,) * m + (1,) * (num_layers - 1 - m) for m in range(num_layers - 1)},
        importance=Importance(
            heads_LN=noise.normal(size=(num_layers, num_heads)),
            ffn_LF=noise.normal(size=(num_layers, ffn)),
            o_mean_LQ=noise.normal(0, 0.01, (num_layers, num_heads * architecture.head_dim)).astype(np.float32),
            down_mean_LF=noise.normal(0, 0.01, (num_layers, ffn)).astype(np.float32),
            metric="WIFV",
        ),
    )


# --- contenders, each in a process of its own


def run_ours(work: Path, adapter: str, shape: str, out: Path) -> None:
    """The stages of `export` between the request and verification. Prints what each took."""
    started = time.perf_counter()
    supernet = load_supernet(
        str(work / "model"),
        adapters=[work / adapter] if adapter else [],
        strategy=work / "strategy.safetensors",
        cache_dir=work / "cache",
    )
    plan = plan_of(work, shape, supernet.gate_widths)
    loaded = time.perf_counter()
    subnet = materialize_subnet(supernet, plan)
    out.mkdir()
    write_formats(subnet, out, {"safetensors": "bf16"})
    print(json.dumps({"load": loaded - started, "write": time.perf_counter() - loaded}))


def run_peft(work: Path, out: Path) -> None:
    """As peft's documentation merges an adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(work / "lora")).merge_and_unload().save_pretrained(out)


def plan_of(work: Path, shape: str, widths: Sequence[float] = ()) -> SubnetPlan:
    supernet = load_supernet(str(work / "model"), strategy=work / "strategy.safetensors", cache_dir=work / "cache")
    assert supernet.strategy is not None
    rules = CutRules(gate_widths=tuple(widths))
    return derive_plan(supernet.strategy, supernet.architecture, Shape.parse(shape), rules)


def mergekit_command(mergekit: str, work: Path, shape: str, out: Path) -> list[str]:
    kept = [layer.source_layer for layer in plan_of(work, shape).layers]
    runs: list[list[int]] = []
    for layer in kept:
        if runs and runs[-1][1] == layer:
            runs[-1][1] = layer + 1
        else:
            runs.append([layer, layer + 1])
    model = str((work / "model").resolve())
    slices = [{"sources": [{"model": model, "layer_range": run}]} for run in runs]
    config = work / "passthrough.yaml"  # JSON is YAML
    config.write_text(json.dumps({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))
    return [mergekit, str(config), str(out), "--lazy-unpickle", "--quiet"]


# --- measuring


def measure(task: str, contender: str, command: Sequence[str], out: Path, inputs: Sequence[Path]) -> Run:
    """Run one contender from a cold page cache; its output stays at `out`."""
    shutil.rmtree(out, ignore_errors=True)
    forget(inputs)
    start = time.perf_counter()
    ran = run_process(command, name=contender)
    files = [path for path in out.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    on_disk = time.perf_counter() - start
    digests = None
    if contender == "ours":
        start = time.perf_counter()
        list_files(out)
        digests = time.perf_counter() - start
    return Run(
        task=task,
        contender=contender,
        wall_s=ran.wall_s,
        on_disk_s=on_disk,
        peak_mb=ran.peak_mb,
        anon_mb=ran.anon_mb,
        output_bytes=sum(path.stat().st_size for path in files),
        digests_s=digests,
        phases_s=json.loads(ran.printed) if contender == "ours" else None,
    )


def forget(paths: Sequence[Path]) -> None:
    """Write everything back and drop these files from the page cache."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for root in paths:
            for path in [root] if root.is_file() else root.rglob("*"):
                if path.is_file():
                    descriptor = os.open(path, os.O_RDONLY)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(descriptor)


def contenders(arguments: argparse.Namespace, work: Path) -> dict[str, dict[str, tuple[Path, Callable[[], list[str]]]]]:
    """Task -> contender -> where it writes, and its command, asked for when its turn comes."""
    full, depth = f"{arguments.layers}x1", f"{arguments.shape.partition('x')[0]}x1"
    me = [sys.executable, "-m", "benchmarks.materialize", "--work", str(work), "--child"]

    def ours(adapter: str, shape: str, out: Path) -> Callable[[], list[str]]:
        return lambda: [*me, "ours", adapter, shape, str(out)]

    cut, copy = work / "out-cut", work / "out-cp"
    merge, peft = work / "out-merge", work / "out-peft"
    shallow, passthrough = work / "out-depth", work / "out-mergekit"
    # Output bytes are copied from what ours wrote, after every byte of the input was read.
    shell = f'cat "{work}"/model/*.safetensors > /dev/null && cp -r "{cut}" "{copy}"'
    tasks = {
        "cut": {"ours": (cut, ours("smol", arguments.shape, cut)), "cp": (copy, lambda: ["sh", "-c", shell])},
        "merge": {
            "ours": (merge, ours("lora", full, merge)),
            "peft": (peft, lambda: [*me, "peft", "", "", str(peft)]),
        },
        "depth": {"ours": (shallow, ours("", depth, shallow))},
    }
    if mergekit := arguments.mergekit and shutil.which(arguments.mergekit):
        tasks["depth"]["mergekit"] = (passthrough, lambda: mergekit_command(mergekit, work, depth, passthrough))
    return tasks


def report(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Medians by task and contender."""
    rows = []
    for task, contender in dict.fromkeys((run.task, run.contender) for run in runs):
        mine = [run for run in runs if (run.task, run.contender) == (task, contender)]
        row: dict[str, Any] = {"task": task, "contender": contender, "runs": len(mine)}
        for field in ("wall_s", "on_disk_s", "peak_mb", "anon_mb"):
            row[field] = round(statistics.median(getattr(run, field) for run in mine), 2)
        row["output_gb"] = round(mine[-1].output_bytes / 1e9, 2)
        print(
            f"{task:6} {contender:9} {row['runs']:2} runs  wall {row['wall_s']:6.1f} s  "
            f"on disk {row['on_disk_s']:6.1f} s  peak {row['peak_mb']:6.0f} MB  anon {row['anon_mb']:6.0f} MB  "
            f"output {row['output_gb']:5.2f} GB"
        )
        if mine[-1].digests_s is not None:
            row["digests_s"] = round(statistics.median(run.digests_s or 0 for run in mine), 2)
            print(f"{'':27} digests of the output {row['digests_s']:.1f} s")
        rows.append(row)
    for task in dict.fromkeys(row["task"] for row in rows):
        by_name = {row["contender"]: row for row in rows if row["task"] == task}
        for other in by_name.keys() - {"ours"}:
            ratios = {
                field: by_name["ours"][field] / by_name[other][field] for field in ("wall_s", "on_disk_s", "peak_mb")
            }
            text = ", ".join(f"{field.rpartition('_')[0]} {ratio:.2f}" for field, ratio in ratios.items())
            print(f"{task}: ours / {other}: {text}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/materialize"))
    parser.add_argument("--tasks", default="cut,merge,depth", help="none of them with ''")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", default="24x0.75")
    parser.add_argument("--mergekit", default="mergekit-yaml", help="the command, of an environment of its own")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--clean", action="store_true", help="remove --work at the end")
    parser.add_argument("--child", nargs=4, metavar=("KIND", "ADAPTER", "SHAPE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.child:
        kind, adapter, shape, out = arguments.child
        if kind == "ours":
            run_ours(work, adapter, shape, Path(out))
        else:
            run_peft(work, Path(out))
        return
    make_inputs(work, arguments.layers)
    start = time.perf_counter()
    load_supernet(str(work / "model"), adapters=[work / "smol", work / "lora"], cache_dir=work / "cache")
    print(f"digests of the inputs: {time.perf_counter() - start:.1f} s, 0 when remembered", flush=True)
    recorded = work / "runs.jsonl"
    inputs = [work / "model", work / "smol", work / "lora"]
    tasks = contenders(arguments, work)
    for number in range(arguments.rounds):
        for task in filter(None, arguments.tasks.split(",")):
            # They take turns at being first; but what cp copies must be there.
            names = list(tasks[task])
            for name in names if task == "cut" or number % 2 == 0 else reversed(names):
                out, command = tasks[task][name]
                run = measure(task, name, command(), out, [*inputs, work / "out-cut"])
                with recorded.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
                print(f"  {task} {name}: {run.wall_s:.1f} s {run.phases_s or ''}", flush=True)
                if (task, name) != ("cut", "ours"):
                    shutil.rmtree(out)
            shutil.rmtree(work / "out-cut", ignore_errors=True)
    if recorded.is_file():
        rows = report([Run(**json.loads(line)) for line in recorded.read_text().splitlines()])
        facts = {"cpus": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__, "rows": rows}
        if arguments.json:
            arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if arguments.clean:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
