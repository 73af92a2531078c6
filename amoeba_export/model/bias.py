"""Compensation: what the removed input channels contributed on average, as a constant (FLAP; DESIGN section 4)."""

from __future__ import annotations

import torch

from amoeba_export.errors import InputError
from amoeba_export.ir import Axis, LayerPlan, Strategy, SubnetPlan

ROWS = 256
"""Rows of a half-precision weight that are widened to fp32 at once, into memory that is used again."""

_NEXT_STEP = "Give the strategy that the plan was derived from (--strategy)."


def compensation_bias(
    w_OI: torch.Tensor,
    kept: torch.Tensor | None,
    axis: Axis,
    layer: LayerPlan,
    plan: SubnetPlan,
    strategy: Strategy | None,
) -> torch.Tensor:
    """Bias [O], fp32, that stands for the removed columns of an o_proj (`query`) or down_proj (`ffn`) weight.

    W[:, removed] @ mean[removed], from the base weight: adapters are not in it, because Stage 2 trains with the bias
    fixed. An imported upstream strategy supplies the vector itself.

    Args:
        w_OI: The whole source weight.
        kept: Kept columns, or None for all.
        axis: What the columns are.
        layer: Which layer of the supernet the weight is from.
        plan: Says where the bias comes from.
        strategy: The input means, or the vectors.

    Raises:
        InputError: The plan asks for compensation and the strategy cannot give it.
    """
    if (imported_O := imported_bias(axis, layer, plan, strategy)) is not None:
        return imported_O
    removed_mean_I = input_means(axis, layer, strategy)
    if kept is not None:
        removed_mean_I[kept] = 0.0
    # A product with zeros for the kept columns: no gathered copy of the removed ones, which can be most of the weight.
    bias_O = torch.empty(len(w_OI))
    wide_BI = torch.empty(min(ROWS, len(w_OI)), w_OI.shape[1])
    for start in range(0, len(w_OI), ROWS):
        rows = w_OI[start : start + ROWS]
        torch.mv(wide_BI[: len(rows)].copy_(rows), removed_mean_I, out=bias_O[start : start + ROWS])
    return bias_O


def imported_bias(axis: Axis, layer: LayerPlan, plan: SubnetPlan, strategy: Strategy | None) -> torch.Tensor | None:
    """The bias that an imported strategy has for the plan's width; None where it is computed from input means.

    Raises:
        InputError: The plan is of such a width, and the strategy has no such.
    """
    if plan.width_key is None:
        return None
    if strategy is None or plan.width_key not in strategy.widths:
        raise InputError(
            f"The plan takes the masks and biases of width {plan.width_key:g}, which this strategy does not have.",
            next_step=_NEXT_STEP,
        )
    width = strategy.widths[plan.width_key]
    bias_LD = width.o_bias_LD if axis == "query" else width.down_bias_LD
    return torch.tensor(bias_LD[layer.source_layer], dtype=torch.float32)


def input_means(axis: Axis, layer: LayerPlan, strategy: Strategy | None) -> torch.Tensor:
    """Mean of every input of an o_proj (`query`) or down_proj (`ffn`), a copy. Raises `InputError` without any."""
    if strategy is None or strategy.importance is None:
        raise InputError(
            "The plan replaces removed channels by their mean, and no strategy with input means is given.",
            next_step=_NEXT_STEP,
        )
    means_LI = strategy.importance.o_mean_LQ if axis == "query" else strategy.importance.down_mean_LF
    return torch.tensor(means_LI[layer.source_layer], dtype=torch.float32)
