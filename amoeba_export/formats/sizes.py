"""Bytes of a cut model's weights in a container, from its dims alone: what files, memory and estimates go by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from amoeba_export.formats import FORMATS
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Where the bytes of the weights are.

    Attributes:
        layers: All layers, with their norms and biases, and the last norm.
        head: What logits are computed with: lm_head, or the embedding that stands for it.
        embedding: The embedding where it is a matrix of its own, else 0. A step reads a row of it per token.
        tables: What is stored besides weights, such as the cosines of every position. A step reads a row of it.
    """

    layers: int
    head: int
    embedding: int
    tables: int = 0

    @property
    def total(self) -> int:
        """Of the files, without headers and the bytes between weights."""
        return self.layers + self.head + self.embedding + self.tables


def weight_bytes(dense: DenseArchitecture, formats: Sequence[str], dtype: str) -> WeightBytes:
    """What the weights of `dense` occupy in the first of `formats` that has `dtype`, else in the first of all."""
    name = next(name for name in (*formats, *FORMATS) if dtype in FORMATS[name].dtypes)
    return FORMATS[name].weight_bytes(dense, dtype=dtype)


def sum_bytes(
    dense: DenseArchitecture,
    *,
    matrix: Callable[[int, int], int],
    head: Callable[[int, int], int],
    vector_bytes: int,
    tables: int = 0,
) -> WeightBytes:
    """Add up what a format makes of each weight.

    Args:
        dense: The cut model.
        matrix: Bytes of a projection in a layer, from its rows (out) and columns (in).
        head: The same of the embedding and lm_head.
        vector_bytes: Of one number of a norm or bias.
        tables: See `WeightBytes`.
    """
    base = dense.base
    embedding = head(base.vocab_size, base.hidden_size)
    read = head(base.head_rows, base.hidden_size) if base.head_rows else embedding
    layers = sum(
        count * sum(matrix(rows, columns) for rows, columns in _projections(base, dims))
        for dims, count in Counter(dense.layers).items()
    )
    num_vectors = dense.num_params - base.embedding_params - (base.head_params if base.has_own_head else 0)
    num_vectors -= sum(base.prunable_params(dims) for dims in dense.layers)
    return WeightBytes(
        layers=layers + num_vectors * vector_bytes,
        head=read,
        embedding=embedding if base.has_own_head else 0,
        tables=tables,
    )


def _projections(base: Architecture, dims: LayerDims) -> Iterator[tuple[int, int]]:
    """Rows and columns of every projection of a layer."""
    hidden, query, kv = base.hidden_size, dims.num_heads * base.head_dim, dims.num_kv_heads * base.head_dim
    if query:
        yield from ((query, hidden), (kv, hidden), (kv, hidden), (hidden, query))
    if dims.ffn_size:
        neurons = dims.ffn_size * base.unit_size
        yield from ((neurons, hidden), (neurons, hidden), (hidden, neurons))
    if dims.ffn_size and base.expert_size:
        yield dims.ffn_size, hidden
