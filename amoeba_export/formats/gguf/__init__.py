"""GGUF for llama.cpp: one file, written through the `gguf` package's header and straight to each tensor's place.

`architecture.py` says which architecture of llama.cpp computes a plan, `layout.py` what it needs besides the plan's
weights, `rope.py` how its layers attend; `tokenizer.py` writes the vocabulary, `writer.py` the file.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats.gguf.architecture import able_architectures, choose_architecture
from amoeba_export.formats.gguf.k_quants import K_QUANTS
from amoeba_export.formats.gguf.layout import expected_tensors, written_layers
from amoeba_export.formats.gguf.writer import QUANTIZATIONS, GgufWriter, tensor_bytes, tensor_type
from amoeba_export.formats.model_type import check_family, check_head
from amoeba_export.formats.sizes import WeightBytes, sum_bytes
from amoeba_export.ir import Architecture, ContainerLimits, DenseArchitecture, LayerDims, Subnet
from amoeba_export.ir.dtype import DTYPES
from amoeba_export.ir.features import features_of
from amoeba_export.ir.rounded import RoundedSource
from amoeba_export.llama_cpp.architectures import NOPE_STEP, LlamaCppArchitecture
from amoeba_export.llama_cpp.quantizer import has_quantizer

default_dtype = "fp16"
dtypes = tuple(QUANTIZATIONS)


def check(dense: DenseArchitecture, *, dtype: str) -> None:
    """Raise `NotRepresentable` when no architecture of llama.cpp computes `dense`, or `dtype` is not a GGUF type."""
    check_family(dense)
    check_head(dense, "GGUF")
    if dtype not in QUANTIZATIONS:
        raise NotRepresentable(
            "GGUF", f"{dtype} is not one of its types", [f"--dtype {known}" for known in QUANTIZATIONS]
        )
    if dtype in K_QUANTS and not has_quantizer():
        raise NotRepresentable(
            "GGUF",
            f"{dtype} is rounded by llama.cpp's own quantizer, and the package that carries it is not installed",
            ["pip install 'amoeba-export[llamacpp]'", "--dtype int8", "--dtype int4"],
        )
    choose_architecture(dense)


def limits(base: Architecture) -> ContainerLimits:
    """See `Format`: those of the architectures of llama.cpp that compute the model."""
    able = able_architectures(base.uncut)
    unrotated = "no_rope" in features_of(base) and all(one.kinds == "every_fourth" for one in able)
    return ContainerLimits(
        container="GGUF",
        output_biases=not able or any({"o", "down"} <= one.biases for one in able),
        whole_heads=bool(able) and all(one.square for one in able),
        unrotated_every=NOPE_STEP if able and unrotated else 0,
    )


def weight_bytes(dense: DenseArchitecture, *, dtype: str) -> WeightBytes:
    """See `Format`. What llama.cpp or a quantized row needs besides the plan's weights is in it."""
    architecture = choose_architecture(dense)
    layers = written_layers(dense, architecture, quantized=DTYPES[dtype].is_quantized)
    if dtype in K_QUANTS or dense.base.expert_size:
        return _bytes_by_tensor(dense, architecture, layers, dtype)

    def matrix(name: str, rows: int, columns: int) -> int:
        kind = tensor_type(dtype, name, (rows, columns), layers, tied=dense.base.tied_embeddings)
        return tensor_bytes((rows, columns), kind)

    return sum_bytes(
        DenseArchitecture(base=dense.base, layers=layers),
        matrix=partial(matrix, ""),
        head=partial(matrix, "output.weight"),
        vector_bytes=DTYPES["fp32"].bits // 8,
    )


def _bytes_by_tensor(
    dense: DenseArchitecture, architecture: LlamaCppArchitecture, layers: tuple[LayerDims, ...], dtype: str
) -> WeightBytes:
    """A type depends on the layer's place, or on the rows of one expert."""
    tied = dense.base.tied_embeddings
    sizes = {
        name: tensor_bytes(shape, tensor_type(dtype, name, shape, layers, tied=tied))
        for name, shape in expected_tensors(dense, architecture, layers)
    }
    embedding = sizes.pop("token_embd.weight")
    head = embedding if tied else sizes.pop("output.weight")
    return WeightBytes(layers=sum(sizes.values()), head=head, embedding=0 if tied else embedding)


def open_writer(
    subnet: Subnet, folder: Path, *, dtype: str = default_dtype, rounded: RoundedSource | None = None
) -> GgufWriter:
    """Start writing `subnet` as `model.gguf`.

    Args:
        subnet: The cut model.
        folder: Where the file goes.
        dtype: `fp32`, `fp16`, `bf16`; `int8` is Q8_0, `int4` is Q4_0 with embeddings and output in Q8_0. `q4_k_m`,
            `q5_k_m` and `q6_k` are llama.cpp's mixtures, rounded by llama.cpp.
        rounded: Weights that are written in place of those given: on grids of Q4_0, which they keep, or in
            bytes of their type.

    Raises:
        NotRepresentable: See `check`; or the tokenizer is one that llama.cpp does not know.
        DiskFull: The file will not fit.
    """
    check(subnet.architecture, dtype=dtype)
    return GgufWriter(subnet, folder, dtype=dtype, rounded=rounded)
