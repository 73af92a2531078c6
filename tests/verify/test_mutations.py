"""Bad artifacts are found and good ones pass, whatever their format, dtype and plan."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amoeba_export.errors import AmoebaError, NotRepresentable
from amoeba_export.ir import SubnetPlan, Supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import artifact, verify_artifact
from tests.materialize.subnets import bare_plan, noise_adapter, open_supernet, plan_for, write
from tests.verify.mutations import UNSEEN, mutations

ARTIFACTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # name: family, plan, dtype, options of the writer
    "safetensors": ("llama", "uniform", "fp32", {}),
    "safetensors-granite-bf16": ("llama-mha", "uniform", "bf16", {}),
    "safetensors-amoeba": ("qwen2", "bare", "fp32", {}),
    "onnx": ("llama", "uniform", "fp32", {}),
    "onnx-standard": ("qwen3", "full", "fp16", {"dialect": "standard"}),
    "onnx-int8": ("mistral", "uniform", "int8", {}),
    "onnx-int4": ("llama", "uniform", "int4", {}),
    "onnx-int4-mixed": ("llama", "uniform", "int4-mixed", {}),
    "gguf": ("qwen2", "full", "fp16", {}),
    "gguf-deci-int8": ("llama", "bare", "int8", {}),
    "gguf-int4": ("llama", "uniform", "int4", {}),
}


@dataclasses.dataclass(frozen=True)
class Built:
    folder: Path
    supernet: Supernet
    plan: SubnetPlan


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """The gguf package says what it writes, and transformers what it misses."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def supernets(tiny_dirs: dict[str, Path]) -> dict[str, Supernet]:
    return {family: open_supernet(folder) for family, folder in tiny_dirs.items()}


def plan_named(supernet: Supernet, name: str) -> SubnetPlan:
    if name == "full":
        return SubnetPlan.full(supernet.architecture)
    return bare_plan(supernet) if name == "bare" else plan_for(supernet, "3x0.75", name)


def build(supernet: Supernet, plan: str, format_name: str, dtype: str, folder: Path, **options: Any) -> Built:
    made = plan_named(supernet, plan)
    write(materialize_subnet(supernet, made), folder / format_name, format_name, dtype, **options)
    return Built(folder, supernet, made)


def test_the_prompts_leave_a_token_out(supernets: dict[str, Supernet]) -> None:
    """Else a changed row of the embedding would prove less than it says."""
    for supernet in supernets.values():
        assert all(UNSEEN not in prompt for prompt in artifact._prompts(supernet))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_is_changed_is_found(supernets: dict[str, Supernet], tmp_path: Path, name: str) -> None:
    """As a file that cannot be used (3) or that computes something else (5), and never as a bug of ours."""
    family, plan, dtype, options = ARTIFACTS[name]
    format_name = name.split("-")[0]
    built = build(supernets[family], plan, format_name, dtype, tmp_path / "good", **options)
    verify_artifact(built.folder, built.supernet, built.plan)
    missed, tried = [], 0
    for what, change in mutations(format_name, built.folder / format_name):
        bad = shutil.copytree(built.folder, tmp_path / "bad")
        change(bad / format_name)
        tried += 1
        try:
            verify_artifact(bad, built.supernet, built.plan)
            missed.append(what)
        except AmoebaError as error:
            if error.exit_code not in (3, 5):
                missed.append(f"{what}: exit {error.exit_code}")
        shutil.rmtree(bad)
    assert missed == []
    assert tried >= 20


GOOD = [
    (family, plan, format_name, dtype)
    for family in ("llama", "llama-mha", "mistral", "qwen2", "qwen3")
    for plan in ("full", "uniform", "adaptive", "bare")
    for format_name, dtypes in (
        ("safetensors", ("fp32", "fp16", "bf16")),
        ("onnx", ("fp32", "fp16", "bf16", "int8", "int4-mixed", "int4")),
        ("gguf", ("fp32", "fp16", "bf16", "int8", "int4")),
    )
    for dtype in dtypes
]


@pytest.mark.parametrize("part", range(6))
def test_what_is_good_passes(supernets: dict[str, Supernet], tmp_path: Path, part: int) -> None:
    """78 of all families, plans, formats and dtypes; every third with one or two adapters."""
    for i, (family, plan, format_name, dtype) in enumerate(GOOD[part::20]):
        supernet = supernets[family]
        if i % 3 == 0:
            adapters = (noise_adapter(supernet), noise_adapter(supernet, dora=True, seed=1))
            supernet = dataclasses.replace(supernet, adapters=adapters[: 1 + i % 2])
        folder = tmp_path / str(i)
        try:
            built = build(supernet, plan, format_name, dtype, folder)
        except NotRepresentable:  # llama.cpp has no QK norms with biases or per-layer widths
            continue
        (report,) = verify_artifact(built.folder, built.supernet, built.plan).formats
        assert report.dtype == dtype
        shutil.rmtree(folder)
