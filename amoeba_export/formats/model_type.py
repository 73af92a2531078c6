"""Which transformers model a cut model is.

A stock type is chosen wherever one computes the same function, so that the folder loads everywhere without code of
ours. The rest is `amoeba` (`modeling_amoeba.py`, beside the weights).
"""

from __future__ import annotations

from collections.abc import Iterator

from amoeba_export.errors import NotRepresentable, UnsupportedModel
from amoeba_export.ir import DenseArchitecture, Family, LayerDims, TensorSpec
from amoeba_export.ir.family import Role
from amoeba_export.ir.features import features_of
from amoeba_export.load.family_file import FamilyFile, read_family, stand_ins, supported_families

AMOEBA = "amoeba"


def check_family(dense: DenseArchitecture) -> None:
    """Raise `UnsupportedModel` for a family that has no file: what it computes is not known."""
    if dense.base.family not in supported_families():
        raise UnsupportedModel(dense.base.family, supported_families())


def check_head(dense: DenseArchitecture, container: str) -> None:
    """Raise `NotRepresentable` for a head of some tokens, where runtimes take the head's rows for the vocabulary."""
    rows, words = dense.base.head_rows, dense.base.vocab_size
    if rows is not None:
        raise NotRepresentable(
            container,
            f"its runtimes compute logits of the whole vocabulary, and the head has {rows} of {words} tokens",
            ("--format onnx", "no --vocab-keep"),
        )


def container_type(dense: DenseArchitecture) -> str:
    """The `model_type` that holds `dense`.

    Whole layers: the source's own type. Layers that differ, or a block that is gone: `amoeba`. Else the first of the
    source's own type, `stand_ins()` and `amoeba` that holds its biases, windows and heads.

    Raises:
        UnsupportedModel: As `check_family`.
    """
    check_family(dense)
    if dense.has_whole_layers:
        return dense.base.family
    dims = dense.layers[0]
    if not dense.is_uniform or not dims.num_heads or not dims.ffn_size:
        return AMOEBA
    candidates = (dense.base.family, *(name for name in stand_ins() if name != dense.base.family))
    return next((name for name in candidates if _holds(read_family(name), dense)), AMOEBA)


def _holds(file: FamilyFile, dense: DenseArchitecture) -> bool:
    """Whether a stock type computes uniform layers of `dense`."""
    base, dims = dense.base, dense.layers[0]
    if file.family.model_type != base.family:
        own_kinds = base.sliding_window is not None and "sliding_window" not in file.config
        if features_of(base) or base.qk_norm or own_kinds:
            return False
    if file.even_heads and base.hidden_size % dims.num_heads:
        return False
    if file.head_dim_follows and base.rope_scaling and base.hidden_size != dims.num_heads * base.head_dim:
        return False
    wanted = {
        "qkv_bias": dims.qkv_bias,
        "o_bias": dims.o_bias,
        "mlp_bias": dims.gate_up_bias or dims.down_bias,
    }
    return all(file.constants[flag] == is_wanted for flag, is_wanted in wanted.items() if flag in file.constants)


def zero_biases(dense: DenseArchitecture, family: Family) -> Iterator[TensorSpec]:
    """Biases that the container's type has and the model does not: stock types switch several with one key."""
    for idx, dims in enumerate(dense.layers):
        for role, size in _zero_bias_sizes(dense, dims):
            yield TensorSpec(name=family.bias(role, idx), shape=(size,))


def num_zero_biases(dense: DenseArchitecture) -> int:
    """Numbers in `zero_biases`."""
    return sum(size for dims in dense.layers for _, size in _zero_bias_sizes(dense, dims))


def _zero_bias_sizes(dense: DenseArchitecture, dims: LayerDims) -> Iterator[tuple[Role, int]]:
    model_type = container_type(dense)
    if model_type == AMOEBA:
        return
    base, switched = dense.base, switches(read_family(model_type), dims)
    query, kv = dims.num_heads * base.head_dim, dims.num_kv_heads * base.head_dim
    table: tuple[tuple[Role, str, bool, int], ...] = (
        ("q", "qkv_bias", dims.qkv_bias, query),
        ("k", "qkv_bias", dims.qkv_bias, kv),
        ("v", "qkv_bias", dims.qkv_bias, kv),
        ("o", "o_bias", dims.o_bias, base.hidden_size),
        ("gate", "mlp_bias", dims.gate_up_bias, dims.ffn_size),
        ("up", "mlp_bias", dims.gate_up_bias, dims.ffn_size),
        ("down", "mlp_bias", dims.down_bias, base.hidden_size),
    )
    for role, flag, is_there, size in table:
        if switched.get(flag, False) and not is_there:
            yield role, size


def switches(file: FamilyFile, dims: LayerDims) -> dict[str, bool]:
    """What a type's keys for biases must say, by `Architecture` flag. Flags of one key have one value."""
    wanted = {"qkv_bias": dims.qkv_bias, "o_bias": dims.o_bias, "mlp_bias": dims.gate_up_bias or dims.down_bias}
    keys = {flag: file.key(flag) for flag in wanted if flag not in file.constants}
    return {flag: any(wanted[other] for other in keys if keys[other] == key) for flag, key in keys.items()}
