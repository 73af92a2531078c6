"""Our ONNX graphs beside those of onnxruntime-genai's model builder: writing, decode, prefill, and what int4 costs.

    python -m benchmarks.onnx_runtime [--model demo] [--dtypes fp32,int4] [--rounds 9] [--writes 3] [--threads N]
                                      [--builder-python PATH] [--optimum-cli PATH] [--transformers-python PATH]
                                      [--keep DIR] [--json FILE]

Everything is interleaved. Writing runs in processes of its own: wall time from start to exit, imports included, and
peak resident memory. Graphs are measured as `amoeba bench` measures artifacts: in turns, each in a process of its own,
from a fresh copy in every round, with the KV cache in one shared buffer, as the GenAI runtime has it. A ratio is the
median over rounds of ours / theirs, beside the interval of `amoeba bench`.
Where the kernel gives huge pages only to who asks (docs/measuring.md), a process has the pages of 4 KiB that happen to
be free, and decode differs by some percent from one to the next; with the `GLIBC_TUNABLES` that are given there, it
does not. An even number of rounds opens each graph first equally often, or nearly so.
In `int4` both have everything in blocks of 32 weights, the embedding and lm_head included, rounded to nearest; ours are
equalized before, and the mean KL divergence from our fp32 graph on a page of text says what that is worth.

`--builder-python` names an interpreter that has `onnxruntime_genai` and what its builder imports; ours, if left out.
With fp32, two more ways to get a graph can stand beside it, each in an environment of its own: `--optimum-cli` is that
of optimum-onnx; `--transformers-python` an interpreter with transformers 5 and onnxscript, for the exporter of
transformers, which writes one graph for prefill and one for decode, each with all weights; their speed is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amoeba_export.backends import Subject, measure_latency
from amoeba_export.cli.console import Talk
from amoeba_export.formats import FORMATS
from amoeba_export.ir import Latency, SubnetPlan, Target, Workload
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.profile import compare_rounds
from benchmarks.process import Ran, run_process

TEXT = Path(__file__).parents[1] / "calibration" / "wikitext2" / "wikitext2.txt"
NUM_TEXT_TOKENS = 1024

Graphs = Mapping[str, Path]

TRANSFORMERS_EXPORT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.exporters import OnnxConfig, OnnxExporter
source, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
sample = dict(AutoTokenizer.from_pretrained(source)("The river rises in the hills", return_tensors="pt"))
OnnxExporter().export_for_generation(model, sample, OnnxConfig(dynamic=True)).save_pretrained(out)
"""


def write_ours(model: str, dtype: str, folder: Path) -> None:
    """One export as the pipeline does it, without measuring or verifying."""
    supernet = load_supernet(model)
    subnet = materialize_subnet(supernet, SubnetPlan.full(supernet.architecture))
    writer = FORMATS["onnx"].open_writer(subnet, folder, dtype=dtype)
    for name, weight in subnet.stream():
        writer.accept(name, weight)
    writer.close()


def compare_speed(graphs: Graphs, arguments: argparse.Namespace, dtype: str) -> dict[str, dict[str, list[float]]]:
    """Times of each graph per round: {metric: {graph: [ms]}}."""
    dense = load_supernet(arguments.model).architecture.uncut
    target = Target(name="cpu", description="", backend="onnxruntime", options={"threads": arguments.threads})
    subjects = [Subject(dense=dense, artifact=path.parent, dtype=dtype, label=name) for name, path in graphs.items()]
    results = measure_latency(subjects, Workload(), target=target, progress=Talk(), rounds=arguments.rounds)
    times: dict[str, dict[str, list[float]]] = {"decode": {}, "prefill": {}}
    for name, result in zip(graphs, results, strict=True):
        if not isinstance(result, Latency):
            raise result
        times["decode"][name], times["prefill"][name] = map(list, zip(*result.rounds, strict=True))
    return times


def mean_kl(graphs: Graphs, reference: Path, tokenizer_folder: Path, threads: int) -> dict[str, float]:
    """Mean KL divergence in nats per token from the graph in `reference`."""
    import onnxruntime
    from transformers import AutoTokenizer

    text = TEXT.read_text(encoding="utf-8")[: 8 * NUM_TEXT_TOKENS]
    ids = AutoTokenizer.from_pretrained(tokenizer_folder)(text)["input_ids"][:NUM_TEXT_TOKENS]

    def log_probabilities(folder: Path) -> np.ndarray[Any, Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        head_dim = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
        feeds |= {value.name: np.zeros((1, value.shape[1], 0, head_dim), np.float32) for value in caches}
        logits = session.run(["logits"], feeds)[0][0].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return result

    expected = log_probabilities(reference)
    return {
        name: float((np.exp(expected) * (expected - log_probabilities(folder))).sum(-1).mean())
        for name, folder in graphs.items()
    }


def builder_command(python: str, source: Path, dtype: str, out: Path) -> list[str]:
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    return [*command, "-p", dtype, "-e", "cpu", "-c", str(out.parent / "cache")]


def peer_commands(arguments: argparse.Namespace, source: Path, work: Path) -> dict[str, list[str]]:
    """The other ways to get a graph that were named."""
    commands = {}
    if arguments.optimum_cli:
        options = ["-m", str(source), "--task", "text-generation-with-past", str(work / "optimum")]
        commands["optimum-cli"] = [arguments.optimum_cli, "export", "onnx", *options]
    if arguments.transformers_python:
        program = [arguments.transformers_python, "-c", TRANSFORMERS_EXPORT]
        commands["transformers"] = [*program, str(source), str(work / "transformers")]
    return commands


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    source = load_supernet(arguments.model).folder
    figures: dict[str, Any] = {}
    graphs: dict[str, dict[str, Path]] = {}
    # All of the writing before the first graph is opened: see `run_process`.
    for dtype in arguments.dtypes.split(","):
        graphs[dtype] = {name: work / f"{name}-{dtype}" / "onnx" for name in ("ours", "builder")}
        me = [sys.executable, "-m", "benchmarks.onnx_runtime", "--model", arguments.model]
        ours = [*me, "--write", dtype, str(graphs[dtype]["ours"])]
        theirs = builder_command(arguments.builder_python, source, dtype, graphs[dtype]["builder"])
        writing: dict[str, list[Ran]] = {name: [] for name in graphs[dtype]}
        for _ in range(arguments.writes):
            writing["ours"].append(run_process(ours))
            writing["builder"].append(run_process(theirs))
        if dtype == "fp32":
            for name, command in peer_commands(arguments, source, work).items():
                writing[name] = [run_process(command)]
        figures[dtype] = {"writing": _writing(dtype, writing)}
    for dtype, written in graphs.items():
        times = compare_speed(written, arguments, dtype)
        figures[dtype]["speed"] = _speed(dtype, times)
        if dtype.startswith("int") and "fp32" in graphs:
            figures[dtype]["mean_kl"] = mean_kl(written, graphs["fp32"]["ours"], source, arguments.threads)
            for name, value in figures[dtype]["mean_kl"].items():
                print(f"{dtype:5} mean KL  {name:22} {value:.4f}")
    return figures


def _writing(dtype: str, samples: Mapping[str, list[Ran]]) -> dict[str, dict[str, float]]:
    figures = {
        name: {field: statistics.median(getattr(ran, field) for ran in runs) for field in ("wall_s", "peak_mb")}
        for name, runs in samples.items()
    }
    for name, figure in figures.items():
        print(f"{dtype:5} writing  {name:22} {figure['wall_s']:6.1f} s {figure['peak_mb']:7.0f} MB peak")
    return figures


def _speed(dtype: str, times: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, dict[str, float]]]:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for metric, samples in times.items():
        figures[metric] = {}
        for name, values in samples.items():
            ratio = statistics.median(a / b for a, b in zip(samples["ours"], values, strict=True))
            interval = compare_rounds(samples["ours"], values)
            figures[metric][name] = {"median_ms": statistics.median(values), "ours_to_this": ratio}
            figures[metric][name] |= {"low": interval.low, "high": interval.high}
            print(
                f"{dtype:5} {metric:8} {name:22} {statistics.median(values):8.2f} ms   ours / this = {ratio:.3f}"
                f" ({interval.low:.3f} to {interval.high:.3f})"
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtypes", default="fp32,int4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--writes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--builder-python", default=sys.executable)
    parser.add_argument("--optimum-cli", metavar="PATH")
    parser.add_argument("--transformers-python", metavar="PATH")
    parser.add_argument("--keep", type=Path, help="write the graphs here and leave them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", nargs=2, metavar=("DTYPE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        dtype, folder = arguments.write
        Path(folder).mkdir(parents=True, exist_ok=True)
        for old in Path(folder).iterdir():
            old.unlink()
        write_ours(arguments.model, dtype, Path(folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        figures = run(arguments, work)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
