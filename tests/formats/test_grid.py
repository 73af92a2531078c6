"""Grids are found in values alone, kept by the writers, and never by chance."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from amoeba_export.formats.gguf.rounding import quantize_q4_0
from amoeba_export.formats.grid import lies_on_grid, offset_grids, symmetric_grids
from amoeba_export.formats.onnx import quantize
from amoeba_export.formats.onnx.precision import PRECISIONS, Blockwise
from amoeba_export.formats.packed import SCHEMES, is_rounded, round_to_nearest
from amoeba_export.load.family_file import read_family
from amoeba_export.verify.stored import STORED, Wanted
from tests.formats.onnx_model import OnnxDecoder, random_weights, subnet_of, torch_logits, write_onnx
from tests.formats.test_onnx_values import adaptive, tokens

KINDS = gguf.GGMLQuantizationType
OFFSETS = Blockwise(4, 32, has_offsets=True)


def from_gguf(kind: gguf.GGMLQuantizationType, rows: int = 16, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """A matrix as a GGUF file of this type has it."""
    w_OI = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return torch.from_numpy(gguf.dequantize(gguf.quantize(w_OI, kind), kind).astype(np.float32))


def like_q4_k(rows: int = 16, columns: int = 256) -> torch.Tensor:
    """Sub-blocks of 32 with a scale and a minimum of six bits each: `gguf` reads Q4_K and does not write it."""
    rng = np.random.default_rng(5)
    steps = 0.003 * rng.integers(24, 64, (rows, columns // 32, 1))
    minima = 0.02 * np.rint(steps * rng.uniform(5, 10, steps.shape) / 0.02)
    values = steps * rng.integers(0, 16, (rows, columns // 32, 32)) - minima
    return torch.from_numpy(values.reshape(rows, columns).astype(np.float32))


def stored_values(w_OI: torch.Tensor, encoding: Blockwise) -> torch.Tensor:
    """What MatMulNBits makes of it, the offsets added up as the graph does."""
    made = quantize.quantize_rows(w_OI, encoding)
    rows, columns = w_OI.shape
    blocks = columns // encoding.block_size

    def integers(packed: np.ndarray) -> np.ndarray:
        if encoding.bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)

    zero = np.full(made.scales.shape, 2 ** (encoding.bits - 1))
    if made.zero_points is not None:
        zero = integers(made.zero_points)[:, : made.scales.shape[1]]
    values = (integers(made.packed).astype(np.float32) - zero[..., None]) * made.scales[..., None]
    whole = values[:, :blocks]
    if encoding.has_offsets:
        whole = whole + values[:, blocks:].reshape(rows, -1)[:, :blocks, None]
    return torch.from_numpy(whole.reshape(rows, columns))


@pytest.mark.parametrize(
    ("w_OI", "encoding", "share"),
    [
        (from_gguf(KINDS.Q4_0), Blockwise(4, 32), 1e-6),
        (from_gguf(KINDS.Q8_0), Blockwise(8, 32), 1e-6),
        (from_gguf(KINDS.Q4_1), OFFSETS, 0.02),
        (from_gguf(KINDS.Q4_0), OFFSETS, 0.02),
        (like_q4_k(), OFFSETS, 0.02),
    ],
    ids=["Q4_0", "Q8_0", "Q4_1", "Q4_0 with offsets", "Q4_K"],
)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_source_keeps_its_own_grid(w_OI: torch.Tensor, encoding: Blockwise, share: float, saved: torch.dtype) -> None:
    """`share`: error allowed, of the largest weight. bf16 rounds by itself."""
    w_OI = w_OI.to(saved).float()
    assert quantize.is_rounded(w_OI, encoding) or encoding.bits == 8
    off = (stored_values(w_OI, encoding) - w_OI).abs().max()
    assert off <= (share + (saved == torch.bfloat16) * 0.01) * w_OI.abs().max()


def test_what_is_on_no_grid_is_rounded_to_the_nearest() -> None:
    w_OI = torch.randn(40, 128, generator=torch.Generator().manual_seed(1))
    w_OI[3] += 5.0  # no zero in its range: all of it is offset
    w_OI[4] = 0.0
    w_OI[5] = 0.7
    w_OI[6, :32] = 20.0 + torch.arange(32) / 100  # an offset beside which its neighbours' are lost
    assert not quantize.is_rounded(w_OI, OFFSETS)
    found = stored_values(w_OI, OFFSETS)
    blocks = w_OI.reshape(40, 4, 32)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    steps = ((high - low) / 14.5).repeat_interleave(32, 1)
    assert ((found - w_OI).abs() <= 0.56 * steps + 1e-6).all()
    assert not found[4].any()
    torch.testing.assert_close(found[5], w_OI[5], rtol=0.08, atol=0)


def test_offsets_lose_less_than_a_grid_around_zero() -> None:
    w_OI = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    errors = [(stored_values(w_OI, encoding) - w_OI).square().mean() for encoding in (OFFSETS, Blockwise(4, 32))]
    assert errors[0] < errors[1]


def test_a_matrix_whose_blocks_were_cut_apart_is_not_kept() -> None:
    w_OI = from_gguf(KINDS.Q4_1, rows=64, columns=512)
    assert quantize.is_rounded(w_OI, OFFSETS)
    kept = np.sort(np.random.default_rng(0).permutation(512)[:384])
    assert not quantize.is_rounded(w_OI[:, kept], OFFSETS)
    whole = torch.cat([w_OI[:, 64:256], w_OI[:, 288:]], dim=1)  # blocks are gone, and none is broken
    assert quantize.is_rounded(whole, OFFSETS)


def test_chance_makes_no_grid() -> None:
    noise = np.random.default_rng(0).standard_normal((4096, 8, 32)).astype(np.float32)
    assert not offset_grids(noise, 4).fits.any()
    assert not symmetric_grids(noise, 4).fits.any()
    assert not lies_on_grid(np.zeros((8, 64), np.float32), block_size=32, bits=4, has_offsets=False)


def test_rows_are_found_alone() -> None:
    """A writer takes a matrix in chunks."""
    w_OI = torch.cat([from_gguf(KINDS.Q4_1), torch.randn(16, 256)])
    whole = quantize.quantize_rows(w_OI, OFFSETS)
    parts = [quantize.quantize_rows(rows, OFFSETS) for rows in w_OI.split(3)]
    np.testing.assert_array_equal(whole.packed, np.concatenate([part.packed for part in parts]))
    np.testing.assert_array_equal(whole.scales, np.concatenate([part.scales for part in parts]))


def is_whole(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight is a projection in whole blocks."""
    return "_proj" in name and weight.dim() == 2 and weight.shape[1] % 32 == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("on_grid", [True, False])
def test_a_graph_with_offsets_computes_with_the_stored_weights(tied: bool, on_grid: bool, tmp_path: Path) -> None:
    """Also where some matrices have rows that no block divides, which have no offsets."""
    dense = adaptive(tied_embeddings=tied)
    source = random_weights(dense)
    if on_grid:
        source = {
            name: from_gguf(KINDS.Q4_1, *weight.shape, seed=i) / 8 if is_whole(name, weight) else weight
            for i, (name, weight) in enumerate(source.items())
        }
    folder = write_onnx(subnet_of(dense, source, tmp_path), tmp_path / "onnx", dtype="int4-mixed")
    shapes = {name: tuple(weight.shape) for name, weight in source.items()}
    wanted = Wanted(shapes=shapes, family=read_family(dense.base.family).family, dense=dense)
    stored = STORED["onnx"](folder, wanted)
    reference = {name: stored.read(name).values for name in source}
    for name, weight in source.items():
        if on_grid and is_whole(name, weight):
            row_scale = (reference[name].norm(dim=1) / weight.norm(dim=1))[:, None]  # rows of up are scaled
            assert (reference[name] / row_scale - weight).abs().max() < 0.03 * weight.abs().max()
    ids = tokens(2, 9)
    expected = torch_logits(dense, reference, ids)
    decoder = OnnxDecoder(folder)
    logits = torch.cat([decoder(ids[:, :6]), *(decoder(ids[:, i : i + 1]) for i in (6, 7, 8))], 1)
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_sizes_count_zero_points_and_offsets(tmp_path: Path) -> None:
    from amoeba_export.formats import FORMATS

    dense = adaptive()
    folder = write_onnx(subnet_of(dense, random_weights(dense), tmp_path), tmp_path / "onnx", dtype="int4-mixed")
    told = FORMATS["onnx"].weight_bytes(dense, dtype="int4-mixed").total
    assert told <= (folder / "model.onnx.data").stat().st_size <= told + 64 * 200 + 4096 * 60
    linear = PRECISIONS["int4-mixed"].linear
    assert linear is not None
    assert linear.zero_point_bytes(96) == 2
    assert linear.num_stored_blocks(96) == 4
    assert linear.for_columns(100).num_stored_blocks(100) == 4


def test_q4_0_is_written_as_it_was() -> None:
    """With a largest weight that no longer reaches the end of the grid, too, where llama.cpp takes another step."""
    w_OI = from_gguf(KINDS.Q4_0)
    w_OI[:, :32][w_OI[:, :32].abs() == w_OI[:, :32].abs().amax(1, keepdim=True)] = 0
    again = gguf.dequantize(quantize_q4_0(w_OI.numpy()), KINDS.Q4_0)
    np.testing.assert_allclose(again, w_OI.numpy(), rtol=1e-3)
    assert np.abs(gguf.dequantize(gguf.quantize(w_OI.numpy(), KINDS.Q4_0), KINDS.Q4_0) - w_OI.numpy()).max() > 0.01


@pytest.mark.parametrize("dtype", SCHEMES)
def test_w4a16_is_written_as_it_was(dtype: str) -> None:
    """Once rounded, a group keeps its integers and its step, though its largest weights are gone."""
    scheme = SCHEMES[dtype]
    w_OI = torch.from_numpy(np.random.default_rng(1).standard_normal((16, 256)).astype(np.float32))
    first = round_to_nearest("w", w_OI, 64, scheme)
    steps_OI = first.scales_OB.repeat_interleave(64, 1)
    integers_OI = first.integers_OI.clamp(max=6) - (
        0 if first.zeros_OB is None else first.zeros_OB.repeat_interleave(64, 1)
    )
    w_OI = integers_OI * steps_OI
    assert is_rounded(w_OI, 64, scheme)
    again = round_to_nearest("w", w_OI, 64, scheme)
    zeros_OI = 0 if again.zeros_OB is None else again.zeros_OB.repeat_interleave(64, 1)
    stored = (again.integers_OI - zeros_OI) * again.scales_OB.repeat_interleave(64, 1)
    torch.testing.assert_close(stored, w_OI, rtol=0, atol=1e-6)
