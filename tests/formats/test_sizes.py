"""What memory and latency go by equals the files that are written: one figure per format and dtype."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from amoeba_export.backends import Subject, measure_latency
from amoeba_export.backends.targets import read_target
from amoeba_export.formats import FORMATS
from amoeba_export.formats.packed import SCHEMES
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.formats.write import write_formats
from amoeba_export.ir import Latency, SubnetPlan, Supernet, Workload
from amoeba_export.ir.dtype import DTYPES, FLOATS, SOURCE
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.numerics import MAX_KL, MAX_PERPLEXITY_RATIO, MAX_REL_DIFF
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, plan_for
from tests.tiny import save_tiny

_LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 1024}
_FAMILIES = {
    "llama": {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64},
    "llama-mha": {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64},
    "qwen2": {"num_attention_heads": 12, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module")
def supernets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Supernet]:
    root = tmp_path_factory.mktemp("sizes")
    for family, dims in _FAMILIES.items():
        save_tiny(root / family, family, **_LARGE, **dims)
        save_bpe(root / family)
    return {family: open_supernet(root / family) for family in _FAMILIES}


def _plan(supernet: Supernet, shape: str) -> SubnetPlan:
    if shape == "full":
        return SubnetPlan.full(supernet.architecture)
    return plan_for(supernet, "2x0.6", shape)


def _weights_bytes(path: Path) -> int:
    """Of a file of weights; the tokenizer in a GGUF's header is not weights."""
    if path.suffix not in (".safetensors", ".data", ".gguf"):
        return 0
    return path.stat().st_size - (gguf.GGUFReader(path).data_offset if path.suffix == ".gguf" else 0)


@pytest.mark.parametrize(
    ("family", "shape"), [("llama", "adaptive"), ("llama-mha", "uniform"), ("qwen2", "full"), ("qwen2", "uniform")]
)
@pytest.mark.parametrize("container", FORMATS)
def test_the_figure_is_the_size_of_the_files(
    supernets: dict[str, Supernet], container: str, family: str, shape: str, tmp_path: Path
) -> None:
    supernet = supernets[family]
    plan = _plan(supernet, shape)
    subnet = materialize_subnet(supernet, plan)
    for dtype in FORMATS[container].dtypes:
        if dtype == SOURCE or (dtype in SCHEMES and shape != "full"):  # no rows of whole groups
            continue
        folder = tmp_path / dtype
        folder.mkdir()
        write_formats(subnet, folder, {container: dtype})
        written = sum(_weights_bytes(path) for path in (folder / container).iterdir())
        found = weight_bytes(plan.dense(supernet.architecture), (container,), dtype).total
        assert found == pytest.approx(written, rel=0.01), dtype


def test_memory_and_estimates_go_by_the_first_format_that_can(supernets: dict[str, Supernet]) -> None:
    dense = SubnetPlan.full(supernets["llama"].architecture).dense(supernets["llama"].architecture)
    onnx, gguf = (weight_bytes(dense, (name,), "int4") for name in ("onnx", "gguf"))
    assert onnx != gguf
    assert weight_bytes(dense, ("safetensors", "gguf"), "int4") == gguf
    assert weight_bytes(dense, ("safetensors",), "int4") == onnx


def test_int8_is_8_bits_and_a_scale_in_every_place(supernets: dict[str, Supernet]) -> None:
    """Blocks of 64 with an fp32 scale in ONNX, 32 in the head; of 32 with an fp16 scale in GGUF: 8.5 bits a weight."""
    base = supernets["llama"].architecture
    dense = SubnetPlan.full(base).dense(base)
    matrices = base.num_layers * base.prunable_params()
    for container, head_bits in (("onnx", 9), ("gguf", 8.5)):
        found = weight_bytes(dense, (container,), "int8")
        assert found.head == base.vocab_size * base.hidden_size * head_bits / 8
        assert found.layers == pytest.approx(matrices * 8.5 / 8, rel=0.005)


def test_an_estimate_reads_these_bytes(supernets: dict[str, Supernet]) -> None:
    """By the bandwidth alone, a step is as long as the weights take to be read."""
    base = supernets["llama-mha"].architecture
    dense = SubnetPlan.full(base).dense(base)
    target = read_target("raspberry-pi-5-onnxruntime")
    subjects = [Subject(dense=dense, dtype=dtype) for dtype in ("fp32", "int8")]
    wide, narrow = measure_latency(subjects, Workload(prompt_tokens=1), target=target)
    assert isinstance(wide, Latency)
    assert isinstance(narrow, Latency)
    bytes_saved = 0
    for sign, dtype in ((1, "fp32"), (-1, "int8")):
        weights = weight_bytes(dense, target.formats, dtype)
        bytes_saved += sign * (weights.layers + weights.head)
    saved_ms = wide.decode.p50_ms - narrow.decode.p50_ms
    assert saved_ms == pytest.approx(bytes_saved / (0.6 * 17.1e6))


def test_every_dtype_has_limits_of_its_class() -> None:
    assert set(MAX_REL_DIFF) | set(MAX_KL) == set(MAX_REL_DIFF) | set(MAX_PERPLEXITY_RATIO) == set(DTYPES)
    assert set(FLOATS) == {"fp32", "fp16", "bf16"}
