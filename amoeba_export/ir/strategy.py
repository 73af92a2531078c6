"""What calibration knows: which layers to keep at each depth, and how much each head and neuron matters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amoeba_export.ir.dense import Compensation
from amoeba_export.ir.plan import Shape

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """FLAP statistics of every layer, from which any width can be derived.

    Attributes:
        heads_LN: Score of each query head: its channels' mean standardised score. float64 [L, N].
        ffn_LF: Standardised score of each FFN neuron, or expert. float64 [L, F].
        o_mean_LQ: Mean input of o_proj over the calibration tokens. float32 [L, N * H].
        down_mean_LF: Mean input of down_proj; of experts, their mean share of a token. float32 [L, F].
        metric: `WIFV`, `WIFN`, `IFV` or `wanda`.
    """

    heads_LN: NDArray[np.float64]
    ffn_LF: NDArray[np.float64]
    o_mean_LQ: NDArray[np.float32]
    down_mean_LF: NDArray[np.float32]
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedWidth:
    """Masks and biases of one width as an upstream strategy file lists them; nothing else can be derived from it.

    Attributes:
        heads_LN: Kept query heads. bool [L, N].
        ffn_LF: Kept neurons. bool [L, F].
        o_bias_LD: Compensation bias of o_proj. float32 [L, D].
        down_bias_LD: Compensation bias of down_proj. float32 [L, D].
    """

    heads_LN: NDArray[np.bool_]
    ffn_LF: NDArray[np.bool_]
    o_bias_LD: NDArray[np.float32]
    down_bias_LD: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """The result of Stage 1.

    Attributes:
        model_id: `Supernet.identity` of the calibrated model, or None for an upstream import that cannot know it.
        num_layers, num_heads, num_kv_heads, head_dim, ffn_size: Dims of the calibrated model, to refuse another one.
        depth: Removed layers -> which layers stay, each a 0/1 tuple num_layers long. 0 -> all ones is always there.
        depth_metric: Removed layers -> the metric of that choice on the search set.
        metric: `loss`, `perplexity` or `accuracy`. Lower is better but for `accuracy`.
        importance: Own strategies. None in an upstream import, which has `widths` instead.
        widths: Upstream imports: width -> masks and biases. The key 1.0 need not be all ones.
        quality: Metric of each measured (depth, width), on a held-out part of the calibration set.
        quality_metric: What `quality` is.
        policy: The policy that `quality` was measured with.
        provenance: Recipe, data, seed, versions: what is needed to repeat it.
        identity: sha256 of the file it was read from, or of what it would be written as.
        compensates: Whether its plans may have biases for what was removed. Not in the file: a target may forbid them.
    """

    model_id: str | None
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    depth: Mapping[int, tuple[int, ...]]
    depth_metric: Mapping[int, float] = field(default_factory=dict)
    metric: str = "loss"
    importance: Importance | None = None
    widths: Mapping[float, FixedWidth] = field(default_factory=dict)
    quality: Mapping[Shape, float] = field(default_factory=dict)
    quality_metric: str = "loss"
    policy: str = "uniform"
    provenance: Mapping[str, str] = field(default_factory=dict)
    identity: str | None = None
    compensates: bool = True

    @property
    def compensation(self) -> Compensation:
        """Which blocks of its plans get a bias for what they lost: `wanda` importances know no means to make it of."""
        if not self.compensates:
            return "none"
        if self.importance is None:
            return "all"
        return "none" if self.importance.metric == "wanda" else "removed"

    @property
    def min_depth(self) -> int:
        """The shallowest subnet that it knows."""
        return self.num_layers - max(self.depth)
