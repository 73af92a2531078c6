"""The bytes of twenty small artifacts: what moves code without changing what it does leaves every line as it was.

    python -m benchmarks.identity > before.txt;  ...;  python -m benchmarks.identity | diff before.txt -

Tiny seeded models are cut over formats, dtypes, policies, adapters, by shape, plan and budget. One line per file:
sha256, artifact, path. No device is asked: the budget is one of an estimated target. Inputs have fixed names, and a run
stands in their folder, so files that name inputs are the same in every run. The digests are those of one machine and
one set of package versions.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from amoeba_export import ExportRequest, export, load_supernet
from amoeba_export.ir import Shape
from amoeba_export.load import write_strategy
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import noise_strategy
from tests.tiny import save_tiny

FAMILIES = ("llama", "qwen3", "mistral")


def requests(root: Path) -> Iterator[tuple[str, ExportRequest]]:
    """Each artifact's name and request; later ones take plans of earlier ones."""
    made = {family: _model(root, family) for family in FAMILIES}
    llama, qwen, mistral = (made[family] for family in FAMILIES)
    tuned = _adapter(root / "tuned", llama.model)

    def cut(request: ExportRequest, formats: str, **settings: object) -> ExportRequest:
        return dataclasses.replace(request, formats=tuple(formats.split(",")), **settings)  # type: ignore[arg-type]

    yield "llama-uniform", cut(llama, "safetensors,onnx,gguf", shape="3x0.5")
    yield "llama-adaptive", cut(llama, "safetensors,onnx", shape="3x0.6", policy="adaptive")
    yield "llama-full", cut(llama, "safetensors,onnx", shape="4x1")
    yield "llama-depth", cut(llama, "safetensors,onnx,gguf", shape="2x1")
    for dtype in ("fp16", "bf16"):
        yield f"llama-{dtype}", cut(llama, "safetensors", shape="3x0.5", dtype=dtype)
    for dtype in ("fp16", "int8", "int4"):
        yield f"llama-onnx-{dtype}", cut(llama, "onnx", shape="3x0.5", dtype=dtype)
    for dtype in ("fp16", "int8"):
        yield f"llama-gguf-{dtype}", cut(llama, "gguf", shape="3x0.5", dtype=dtype)
    yield "llama-plan", cut(llama, "safetensors,onnx", plan=root / "llama-adaptive")
    yield "llama-adapter", cut(llama, "safetensors,onnx", shape="3x0.5", adapters=(tuned,))
    yield "llama-adapter-int4", cut(llama, "onnx", shape="3x0.5", adapters=(tuned,), dtype="int4")
    yield "qwen3-uniform", cut(qwen, "safetensors,onnx", shape="3x0.5")
    yield "qwen3-adaptive-int8", cut(qwen, "onnx", shape="4x0.7", policy="adaptive", dtype="int8")
    yield "mistral-depth", cut(mistral, "safetensors,onnx,gguf", shape="3x1")
    yield "mistral-uniform", cut(mistral, "safetensors,onnx", shape="4x0.75")
    estimated = {"target": "jetson", "latency": "92%", "dtype": "fp16"}
    yield "llama-budget", cut(llama, "safetensors,onnx", **estimated)
    yield "llama-budget-adaptive", cut(llama, "onnx", policy="adaptive", **estimated)


def _model(root: Path, family: str) -> ExportRequest:
    folder = save_tiny(root / family, family)
    save_bpe(folder)
    supernet = load_supernet(str(folder))
    quality = {Shape(depth, width): 10 - depth - 2 * width for depth in (4, 3, 2) for width in (1.0, 0.75, 0.5)}
    strategy = root / f"{family}.safetensors"
    write_strategy(
        dataclasses.replace(noise_strategy(supernet.architecture), model_id=supernet.identity, quality=quality),
        strategy,
    )
    return ExportRequest(model=str(folder), strategy=strategy)


def _adapter(folder: Path, model: str) -> Path:
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings).save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="artifacts whose name begins so")
    only = parser.parse_args().only
    from amoeba_export.artifact import sha256_file

    root = Path()
    with tempfile.TemporaryDirectory(prefix="amoeba-identity-") as scratch, contextlib.chdir(scratch):
        for name, request in requests(root):
            if not name.startswith(only):
                continue
            export(dataclasses.replace(request, out=root / name))
            for path in sorted((root / name).rglob("*")):
                if path.is_file():
                    print(sha256_file(path), name, path.relative_to(root / name))
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
