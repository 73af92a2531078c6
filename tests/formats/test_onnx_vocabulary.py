"""A head that computes logits of some tokens: values, bytes, and who can hold it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from amoeba_export.errors import DamagedFile, NotRepresentable, NumbersDiffer, WeightsMismatch
from amoeba_export.formats import FORMATS
from amoeba_export.formats.onnx import write_random
from amoeba_export.formats.sizes import weight_bytes
from amoeba_export.ir import Supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import verify_artifact
from amoeba_export.verify.reload import open_format
from tests.materialize.subnets import open_supernet, plan_for
from tests.tiny import VOCAB, save_tiny

TOKENS = (0, 1, 2, 5, 6, 7, 40, 41, 77, 90, 100, 101, 102, 126, 127)
DROPPED = [idx for idx in range(VOCAB) if idx not in TOKENS]
LOWEST = {"fp32": float(np.finfo(np.float32).min), "fp16": -65504.0}
FAMILIES = {"tied": "llama", "untied": "llama-mha"}


def opened_supernet(folder: Path, kind: str, **overrides: object) -> Supernet:
    save_tiny(folder, FAMILIES[kind], **overrides)
    return open_supernet(folder)


def written(supernet: Supernet, out: Path, dtype: str, dialect: str = "ort") -> Path:
    """ONNX of a cut, alone in an artifact's folder."""
    subnet = materialize_subnet(supernet, plan_for(supernet, "3x0.6"))
    (out / "onnx").mkdir(parents=True)
    writer = FORMATS["onnx"].open_writer(subnet, out / "onnx", dtype=dtype, dialect=dialect)
    for name, weight in subnet.stream():
        writer.accept(name, weight)
    writer.close()
    return out


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return open_format("onnx", folder).logits(ids)


CASES = [
    *((kind, dtype, "ort") for kind in FAMILIES for dtype in ("fp32", "fp16", "int8", "int4", "int4-mixed")),
    *((kind, dtype, "standard") for kind in FAMILIES for dtype in ("fp32", "fp16")),
]


@pytest.mark.parametrize(("kind", "dtype", "dialect"), CASES)
def test_kept_logits_are_those_of_the_whole_head(kind: str, dtype: str, dialect: str, tmp_path: Path) -> None:
    supernet = opened_supernet(tmp_path / "model", kind)
    whole = written(supernet, tmp_path / "whole", dtype, dialect)
    small = written(supernet.with_head_tokens(TOKENS), tmp_path / "small", dtype, dialect)
    ids = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))
    expected, found = logits_of(whole, ids), logits_of(small, ids)
    assert found.shape == expected.shape
    # Products of fewer rows may be added in another order.
    tolerance = 2e-3 if dtype == "fp16" else 1e-5
    torch.testing.assert_close(found[..., list(TOKENS)], expected[..., list(TOKENS)], rtol=0, atol=tolerance)
    assert bool((found[..., DROPPED] == LOWEST["fp16" if dtype == "fp16" else "fp32"]).all())
    assert set(found.argmax(-1).flatten().tolist()) <= set(TOKENS)
    assert bool((found.softmax(-1)[..., DROPPED] == 0).all())


@pytest.mark.parametrize(("kind", "dtype", "dialect"), CASES)
def test_verification_passes_and_compares_the_kept_tokens(kind: str, dtype: str, dialect: str, tmp_path: Path) -> None:
    supernet = opened_supernet(tmp_path / "model", kind).with_head_tokens(TOKENS)
    folder = written(supernet, tmp_path / "out", dtype, dialect)
    (report,) = verify_artifact(folder, supernet, plan_for(supernet, "3x0.6")).formats
    assert report.dtype == dtype
    assert set(report.tokens) <= set(TOKENS)
    if dtype == "fp32":
        assert report.distance.max_abs_diff < 1e-4


def tensor(folder: Path, name: str) -> tuple[onnx.ModelProto, onnx.TensorProto, np.ndarray]:
    """An initializer of an artifact's graph, and its values, mapped from the data file for writing."""
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (found,) = (one for one in model.graph.initializer if one.name == name)
    if found.data_location != onnx.TensorProto.EXTERNAL:
        return model, found, onnx.numpy_helper.to_array(found).copy()
    place = {entry.key: entry.value for entry in found.external_data}
    values = np.memmap(
        path.parent / place["location"],
        mode="r+",
        dtype=onnx.helper.tensor_dtype_to_np_dtype(found.data_type),
        offset=int(place["offset"]),
        shape=tuple(found.dims),
    )
    return model, found, values


def damaged(tmp_path: Path, kind: str = "tied", dtype: str = "fp32") -> tuple[Path, Supernet]:
    supernet = opened_supernet(tmp_path / "model", kind).with_head_tokens(TOKENS)
    return written(supernet, tmp_path / "out", dtype), supernet


def verified(folder: Path, supernet: Supernet) -> None:
    verify_artifact(folder, supernet, plan_for(supernet, "3x0.6"))


@pytest.mark.parametrize(("kind", "dtype"), [("tied", "fp32"), ("untied", "fp32"), ("tied", "int4"), ("tied", "fp16")])
def test_a_wrong_row_is_found(kind: str, dtype: str, tmp_path: Path) -> None:
    folder, supernet = damaged(tmp_path, kind, dtype)
    _, _, values = tensor(folder, "lm_head.weight_q4" if dtype == "int4" else "lm_head.weight")
    values[9] = values[4]
    values.flush()
    with pytest.raises(NumbersDiffer) as caught:
        verified(folder, supernet)
    assert "lm_head.weight differs in 1 of 15 rows" in caught.value.what


def test_a_wrong_place_is_found(tmp_path: Path) -> None:
    folder, supernet = damaged(tmp_path)
    _, _, values = tensor(folder, "lm_head.tokens")
    assert tuple(values.reshape(-1)) == TOKENS
    values[0, 0, 3] = 8
    values.flush()
    with pytest.raises(WeightsMismatch) as caught:
        verified(folder, supernet)
    assert "lm_head.tokens has 1 other tokens than the plan, the first at row 3" in caught.value.what


def test_a_graph_that_scatters_otherwise_is_found(tmp_path: Path) -> None:
    """The list of tokens is as it should be, and the graph reads another."""
    folder, supernet = damaged(tmp_path)
    model, _, values = tensor(folder, "lm_head.tokens")
    other = np.array(values)
    other[0, 0, [3, 4]] = other[0, 0, [4, 3]]
    model.graph.initializer.append(onnx.numpy_helper.from_array(other, "other"))
    for node in model.graph.node:
        node.input[:] = ["other" if name == "lm_head.tokens" else name for name in node.input]
    (folder / "onnx" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NumbersDiffer):
        verified(folder, supernet)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_tokens_that_could_be_chosen_are_found(value: float, tmp_path: Path) -> None:
    folder, supernet = damaged(tmp_path)
    model, found, values = tensor(folder, "lowest")
    found.CopyFrom(onnx.numpy_helper.from_array(np.full_like(values, value), "lowest"))
    (folder / "onnx" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NumbersDiffer) as caught:
        verified(folder, supernet)
    assert f"tokens that the plan does not keep have logits of up to {value:.3g}" in caught.value.what


def test_a_whole_head_is_not_that_of_a_plan_with_tokens_nor_the_other_way_round(tmp_path: Path) -> None:
    supernet = opened_supernet(tmp_path / "model", "tied")
    small = supernet.with_head_tokens(TOKENS)
    with pytest.raises(DamagedFile, match=r"lm_head\.tokens"):
        verified(written(supernet, tmp_path / "whole", "fp32"), small)
    with pytest.raises(WeightsMismatch, match="not part of this plan"):
        verified(written(small, tmp_path / "small", "fp32"), supernet)


@pytest.mark.parametrize(("container", "dtype"), [("gguf", "fp16"), ("gguf", "int4"), ("safetensors", "bf16")])
def test_containers_whose_runtimes_know_one_vocabulary_refuse_it(container: str, dtype: str, tmp_path: Path) -> None:
    dense = opened_supernet(tmp_path / "model", "tied").with_head_tokens(TOKENS).architecture.uncut
    name = {"gguf": "GGUF"}.get(container, container)
    with pytest.raises(NotRepresentable) as caught:
        FORMATS[container].check(dense, dtype=dtype)
    assert caught.value.exit_code == 7
    assert str(caught.value) == (
        f"{name} cannot hold this plan: its runtimes compute logits of the whole vocabulary, and the head has 15 of "
        "128 tokens.\n  next:  Use one of: --format onnx, no --vocab-keep."
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_bytes_are_counted(kind: str, dtype: str, tmp_path: Path) -> None:
    """A tied head is stored beside the embedding then: that is what it costs."""
    supernet = opened_supernet(tmp_path / "model", kind, vocab_size=4096)
    tokens = tuple(range(0, 4096, 4))
    small = supernet.with_head_tokens(tokens)
    sizes = {}
    for name, one in (("whole", supernet), ("small", small)):
        folder = written(one, tmp_path / name, dtype)
        counted = weight_bytes(plan_for(one, "3x0.6").dense(one.architecture), ("onnx",), dtype)
        sizes[name] = (folder / "onnx" / "model.onnx.data").stat().st_size, counted
        # Every tensor begins at a page, at most.
        assert 0 <= sizes[name][0] - counted.total < 60 * 4096, (kind, dtype)
    (whole_size, whole), (small_size, few) = sizes["whole"], sizes["small"]
    assert few.head * 4 == whole.head
    assert few.layers == whole.layers
    difference = small_size - whole_size
    expected = few.head if kind == "tied" else few.head - whole.head
    assert abs(difference - expected - 8 * len(tokens)) < 4 * 4096


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_a_random_graph_is_that_of_the_file_but_for_its_values(dialect: str, tmp_path: Path) -> None:
    supernet = opened_supernet(tmp_path / "model", "tied").with_head_tokens(TOKENS)
    folder = written(supernet, tmp_path / "out", "fp32", dialect)
    (tmp_path / "random" / "onnx").mkdir(parents=True)
    dense = plan_for(supernet, "3x0.6").dense(supernet.architecture)
    write_random(dense, tmp_path / "random" / "onnx", dtype="fp32", dialect=dialect)
    graphs = [(at / "onnx" / "model.onnx").read_bytes() for at in (tmp_path / "random", folder)]
    assert graphs[0] == graphs[1]
    ids = torch.randint(VOCAB, (1, 5))
    assert int((logits_of(tmp_path / "random", ids)[0, 0] > -1e4).sum()) == len(TOKENS)
