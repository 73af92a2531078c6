"""What was asked of `export`, as given and as resolved. All bad settings are reported at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.calibrate import Recipe
from amoeba_export.formats import FORMATS
from amoeba_export.ir import Architecture, Budget, Metric, Policy, Shape, SubnetPlan, Supernet, Target, Workload
from amoeba_export.ir.derive import CutRules
from amoeba_export.ir.dtype import AUTO
from amoeba_export.ir.metric import QualityLimit
from amoeba_export.refit import HealSettings, RefitRecipe, load_refit_recipe


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The settings of one export as a user gives them. None means: the target's default.

    Exactly one of limits (`latency`, `throughput`, `quality`), `shape`, `plan` and `pick` chooses the subnet; with one
    of the last three, the limits are checked. `target` may be left out only where nothing is to be measured.

    Attributes:
        latency: `50ms` or `75%` of `metric`; several with their metrics as `decode=50ms,prefill=300ms`.
        throughput: The least decode speed, such as `30tok/s`, of all sequences of the batch together.
        memory: The most that the model may occupy, such as `900MB`, where that is less than the target allows.
        quality: The worst value of the quality metric that is accepted, such as `4.2`. Without a limit on the latency,
            the fastest model that is as good is taken.
        quality_loss: The same as a share that it may be worse than the full model's, such as `5%`.
        refit: `off`, `fast`, `full`, or the file that a given plan names.
        heal: How long to distil what was refitted from the full model, such as `20m` or `2Mtok`, or `off`. Left out:
            what the recipe of the refit says, where the model is small.
        pick: Number of a choice on the frontier that `amoeba frontier` shows for the same settings.
        calibration_data: Texts of the user's own domain, for half of the tokens of a refit and of rounding.
        rounding: `data` to choose 4-bit integers with data, which is done where it can be when nothing is said, or
            `nearest`.
        vocab_keep: Compute logits of some tokens alone: so many, the most frequent ones of the refit's texts; those of
            a text; or those of a JSON list of ids.
    """

    model: str = "demo"
    target: str | None = None
    latency: str | None = None
    throughput: str | None = None
    memory: str | None = None
    quality: str | None = None
    quality_loss: str | None = None
    metric: str | None = None
    percentile: int = 50
    prompt_tokens: int = 128
    generate_tokens: int = 128
    batch: int = 1
    strategy: Path | None = None
    recipe: str = "quick"
    seed: int = 0
    refit: str | None = None
    heal: str | None = None
    calibration_data: tuple[Path, ...] = ()
    rounding: str | None = None
    vocab_keep: str | None = None
    adapters: tuple[Path, ...] = ()
    shape: str | None = None
    plan: Path | None = None
    pick: int | None = None
    policy: str = "uniform"
    formats: tuple[str, ...] | None = None
    dtype: str | None = None
    require_measured: bool = False
    out: Path | None = None
    force: bool = False
    dry_run: bool = False

    def refit_recipe(self, name: str) -> RefitRecipe:
        """A recipe of a refit, of healing or of rounding: half of it the user's texts, where there are some."""
        return load_refit_recipe(name).with_texts(self.calibration_data)


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request with every name looked up and every value read.

    Attributes:
        budgets: All of them hold. The first is the one that is reported and that the search uses up.
        quality: The worst that is accepted, or None.
        memory_limit_mb: The least of what the target and the request allow, or None.
        recipe: Of the calibration that makes the strategy; None where one is given.
    """

    request: ExportRequest
    target: Target | None
    metric: Metric
    budgets: tuple[Budget, ...]
    quality: QualityLimit | None
    memory_limit_mb: float | None
    workload: Workload
    shape: Shape | None
    plan: SubnetPlan | None
    policy: Policy
    recipe: Recipe | None
    formats: tuple[str, ...]
    dtype: str | None
    refit: str
    refit_file: Path | None
    heal: HealSettings | None
    out: Path

    @property
    def budget(self) -> Budget | None:
        """The first of the budgets; None when nothing limits the latency."""
        return self.budgets[0] if self.budgets else None

    @property
    def percentile(self) -> int:
        """Of the latencies that are compared."""
        return self.budgets[0].percentile if self.budgets else self.request.percentile

    @property
    def is_search(self) -> bool:
        """Whether nothing but limits says what the subnet is."""
        return self.shape is None and self.plan is None and self.request.pick is None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Precisions that may be chosen, the preferred one first. Shares of the full model mean it in that one."""
        if self.dtype != AUTO:
            return (self.dtype,) if self.dtype else ()
        held = FORMATS[self.formats[0]].dtypes
        return tuple(dtype for dtype in (self.target.dtypes if self.target else ()) if dtype in held)

    @property
    def explicit_dtype(self) -> bool:
        """Whether the user named the dtype, so that it must be possible; a target's default gives way."""
        return self.request.dtype not in (None, AUTO)

    @property
    def align(self) -> int:
        """FFN counts are multiples of this."""
        return math.lcm(self.target.align, self.target.limits.ffn_align(self.dtype)) if self.target else 1

    def rules(self, supernet: Supernet, dtype: str | None) -> CutRules:
        """How widths are cut: as the request, the target's runtime and the containers want it."""
        return CutRules(
            policy=self.policy,
            align=self.align,
            head_multiple=self._head_multiple(supernet.architecture, dtype),
            gate_widths=supernet.gate_widths,
        )

    def _head_multiple(self, architecture: Architecture, dtype: str | None) -> int:
        if any(FORMATS[name].limits(architecture).whole_heads for name in self.formats):
            return architecture.num_heads
        return self.target.limits.head_multiple(architecture, dtype) if self.target else 1

    @property
    def summary(self) -> str:
        """The resolved request in one line, said before any work."""
        request, work = self.request, self.workload
        what = f"{self.policy} subnet"
        if self.shape or self.plan:
            what = f"plan {request.plan}" if self.plan else f"shape {self.shape}"
        elif request.pick:
            what = f"number {request.pick} of the frontier"
        elif not (self.budgets or self.quality):
            what = "the frontier"
        limits = [text for text in (request.latency, request.throughput, request.memory) if text]
        limit = f" within {' and '.join(limits)} ({self.metric} p{self.percentile})" if limits else ""
        limit += f", {self.quality}" if self.quality else ""
        where = f" on {self.target.name}" if self.target else ""
        use = f", {work.prompt_tokens}+{work.generate_tokens} tokens, batch {work.batch}" if self.target else ""
        return f"{request.model}: {what}{limit}{where}{use} -> {', '.join(self.formats)} {self.dtype or ''}".rstrip()
