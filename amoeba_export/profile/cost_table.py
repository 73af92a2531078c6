"""The latency of any cut of one model on one target, from a dozen measured graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

from amoeba_export.errors import InputError, TargetError, WrongModel
from amoeba_export.ir import Architecture, DenseArchitecture, Latency, Metric, Source, Timing, Workload
from amoeba_export.profile.features import BEYOND, Counts, Phase, counts_of, dims_of, features, weights_read
from amoeba_export.profile.fit import MIN_SPARE_ROWS, Fit, fit_relative, num_terms
from amoeba_export.profile.knee import find_knee, fit_with_knee

PHASES: tuple[Phase, ...] = ("decode", "prefill")
PERCENTILES = (50, 90)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured graph, reduced to what the cost model looks at.

    Attributes:
        prompt_tokens: Length of the prompt, and of the KV cache while decoding.
    """

    layers: tuple[Counts, ...]
    prompt_tokens: int
    decode: Timing
    prefill: Timing

    def milliseconds(self, phase: Phase, percentile: int) -> float:
        """The measured time of `phase`."""
        timing = self._timing(phase)
        return timing.p90_ms if percentile == 90 else timing.p50_ms

    def noise(self, phase: Phase) -> float:
        """Relative scatter of the measurement of `phase`, 0 where it is not known."""
        return self._timing(phase).noise or 0.0

    def _timing(self, phase: Phase) -> Timing:
        return self.decode if phase == "decode" else self.prefill


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs of one model's parts on one target, fitted to measurements and able to say how wrong it may be.

    Attributes:
        target: Name of the target.
        dtype: Precision of the measured graphs.
        dims: What `dims_of` says of the model. A model with other dims is refused.
        workload: What `predict` assumes unless told otherwise. The batch is the same in all measurements.
        device: What the backend said of the device.
        source: How the measurements are known.
        measurements: Everything that the fits rest on.
        fits: By phase and percentile, such as `decode_p50`.
    """

    target: str
    dtype: str
    dims: Mapping[str, int]
    workload: Workload
    source: Source
    measurements: tuple[Measurement, ...]
    fits: Mapping[str, Fit]
    device: Mapping[str, str] = field(default_factory=dict)

    def predict(
        self,
        dense: DenseArchitecture,
        metric: Metric = "decode",
        percentile: int = 50,
        *,
        workload: Workload | None = None,
    ) -> tuple[float, float]:
        """Milliseconds of `metric`, and the relative half-width that 9 of 10 measurements stay within.

        For `e2e` the half-widths of both phases add up: they come from the same machine and do not cancel.

        Raises:
            WrongModel: `dense` is cut from a model with other dims.
            InputError: `workload` has another batch, or a prompt length that the measurements cannot tell.
        """
        self._check_model(dense.base)
        workload = workload or self.workload
        self._check_workload(workload)
        if metric != "e2e":
            return self._predict_phase(dense, metric, percentile, workload)
        prefill_ms, prefill_error = self._predict_phase(dense, "prefill", percentile, workload)
        token_ms, decode_error = self._predict_phase(dense, "decode", percentile, workload)
        decode_ms = workload.generate_tokens * token_ms
        total_ms = prefill_ms + decode_ms
        return total_ms, (prefill_ms * prefill_error + decode_ms * decode_error) / total_ms

    def pieces(self, dense: DenseArchitecture, metric: Metric = "decode", percentile: int = 50) -> tuple[float, ...]:
        """Sums over the parts of a model in milliseconds, the larger one of which is the prediction.

        One without a knee. With one, the second counts every weight at the price above the knee: below it, that sum is
        the smaller one.
        """
        tokens = self.workload.prompt_tokens
        layers = counts_of(dense)
        fixed_ms, share = 0.0, 1
        if metric == "e2e":
            prefill = features(layers, self.dims, "prefill", tokens)
            fixed_ms = self.fits[f"prefill_p{percentile}"].milliseconds(prefill)
            share = self.workload.generate_tokens
        phase: Phase = "prefill" if metric == "prefill" else "decode"
        fit, row = self.fits[f"{phase}_p{percentile}"], features(layers, self.dims, phase, tokens)
        if fit.knee is None:
            return (fixed_ms + share * fit.milliseconds(row),)
        above = weights_read(layers, self.dims) - fit.knee
        return tuple(fixed_ms + share * fit.milliseconds({**row, BEYOND: beyond}) for beyond in (0.0, above))

    def latency(self, dense: DenseArchitecture, *, workload: Workload | None = None) -> Latency:
        """The prediction of both phases as a `Latency`, called `recorded` unless the table itself is an estimate."""
        timings = {}
        errors = []
        for phase in PHASES:
            p50_ms, error = self.predict(dense, phase, 50, workload=workload)
            p90_ms, _ = self.predict(dense, phase, 90, workload=workload)
            timings[phase] = Timing(p50_ms=p50_ms, p90_ms=max(p50_ms, p90_ms), num_samples=0)
            errors.append(error)
        return Latency(
            decode=timings["decode"],
            prefill=timings["prefill"],
            source="analytic" if self.source == "analytic" else "recorded",
            workload=workload or self.workload,
            device=self.device,
            uncertainty=max(errors),
        )

    @cached_property
    def _checked(self) -> dict[str, Architecture]:
        """The last model that has these dims."""
        return {}

    @cached_property
    def prompt_lengths(self) -> tuple[int, ...]:
        """The prompt lengths that were measured."""
        return tuple(sorted({measurement.prompt_tokens for measurement in self.measurements}))

    @property
    def noise(self) -> float:
        """Median scatter between the rounds of a measurement, 0 where it is not known."""
        return max(median(item.noise(phase) for item in self.measurements) for phase in PHASES)

    @property
    def suspects(self) -> tuple[int, ...]:
        """Positions of measurements worth taking again before they are believed.

        A measurement is one if, in either phase, its rounds scatter by more than 10 %, or if the fit to the others
        misses it by more than 10 % and by more than six times what their scatter explains.
        """
        found: set[int] = set()
        for phase in PHASES:
            fit = self.fits[f"{phase}_p50"]
            for i, (error, ratio) in enumerate(zip(fit.leave_one_out, fit.studentized, strict=True)):
                if abs(error) > 0.1 and abs(ratio) > 6:
                    found.add(i)
            found.update(i for i, item in enumerate(self.measurements) if item.noise(phase) > 0.1)
        return tuple(sorted(found))

    def _predict_phase(
        self, dense: DenseArchitecture, phase: Phase, percentile: int, workload: Workload
    ) -> tuple[float, float]:
        layers, fit = counts_of(dense), self.fits[f"{phase}_p{percentile}"]
        row = features(layers, self.dims, phase, workload.prompt_tokens)
        if fit.knee is not None:
            row[BEYOND] = max(0.0, weights_read(layers, self.dims) - fit.knee)
        return fit.predict(row)

    def _check_model(self, architecture: Architecture) -> None:
        if architecture is self._checked.get("last"):  # a search asks about thousands of cuts of one model
            return
        dims = dims_of(architecture)
        if dims != dict(self.dims):
            names = dict.fromkeys([*dims, *self.dims])
            raise WrongModel(
                "The cost table",
                [f"its {name} is {self.dims.get(name)}, not {dims.get(name)}" for name in names
                 if self.dims.get(name) != dims.get(name)],
            )  # fmt: skip
        self._checked["last"] = architecture

    def _check_workload(self, workload: Workload) -> None:
        if workload.batch != self.workload.batch:
            raise InputError(
                f"The cost table was measured with batch {self.workload.batch}, not {workload.batch}.",
                next_step=f"Profile the target again with --batch {workload.batch}.",
            )
        lengths = self.prompt_lengths
        if workload.prompt_tokens not in lengths and len(lengths) == 1:
            raise InputError(
                f"The cost table was measured with {lengths[0]} prompt tokens and cannot tell the latency at "
                f"{workload.prompt_tokens}.",
                next_step=f"Profile the target again with --prompt {workload.prompt_tokens}.",
            )


def measurement(dense: DenseArchitecture, latency: Latency) -> Measurement:
    """One row of a cost table."""
    return Measurement(
        layers=counts_of(dense),
        prompt_tokens=latency.workload.prompt_tokens,
        decode=latency.decode,
        prefill=latency.prefill,
    )


def fit_cost_table(
    measured: Sequence[tuple[DenseArchitecture, Latency]],
    *,
    target: str,
    dtype: str,
    device: Mapping[str, str] | None = None,
) -> CostTable:
    """Fit decode and prefill to measured graphs of one model.

    The workload of the first measurement becomes the table's. Measurements may differ in `prompt_tokens`: the KV length
    is then a term of its own.

    Args:
        measured: Graphs that span the space (see `design_graphs`), each with its latency; same batch throughout.
        target: Name of the target.
        dtype: Precision of the graphs.
        device: What the backend says of the device; by default what the first latency says.

    Raises:
        TargetError: Too few graphs to tell the terms of the model apart, or a time that is not positive.
    """
    assert measured, "there is nothing to fit"
    first_dense, first = measured[0]
    assert all(latency.workload.batch == first.workload.batch for _, latency in measured), "batches differ"
    return _fitted(
        CostTable(
            target=target,
            dtype=dtype,
            dims=dims_of(first_dense.base),
            workload=first.workload,
            source=first.source,
            measurements=tuple(measurement(dense, latency) for dense, latency in measured),
            fits={},
            device=dict(first.device if device is None else device),
        )
    )


def refine(table: CostTable, dense: DenseArchitecture, latency: Latency) -> CostTable:
    """`table` with one more measurement, such as that of an artifact, and its fits renewed.

    A later measurement of the same counts and prompt length replaces the earlier one.

    Raises:
        WrongModel: `dense` is cut from a model with other dims.
        TargetError: A time is not positive.
    """
    table._check_model(dense.base)
    new = measurement(dense, latency)
    others = tuple(
        old for old in table.measurements if (old.layers, old.prompt_tokens) != (new.layers, new.prompt_tokens)
    )
    return _fitted(replace(table, measurements=(*others, new)))


def _fitted(table: CostTable) -> CostTable:
    fits = {}
    for phase in PHASES:
        rows = [features(item.layers, table.dims, phase, item.prompt_tokens) for item in table.measurements]
        needed = num_terms(rows) + MIN_SPARE_ROWS
        if len(rows) < needed:
            raise TargetError(
                f"{len(rows)} measured graphs are too few for a cost table of '{table.target}': these need {needed}.",
                next_step="Profile more graphs; if some failed on the device, see the messages above.",
            )
        knee: float | None = None
        for percentile in PERCENTILES:
            measured_ms = [item.milliseconds(phase, percentile) for item in table.measurements]
            for position, value in enumerate(measured_ms):
                if not (math.isfinite(value) and value > 0):
                    raise TargetError(
                        f"Measuring {phase} on '{table.target}' gave {value} ms, which cannot be.",
                        where=f"measurement {position}",
                        next_step="Check the target with 'amoeba targets check' and profile it again.",
                    )
            noise = [item.noise(phase) for item in table.measurements]
            fit = fit_relative(rows, measured_ms, noise=noise)
            if phase == "decode":  # a prompt is computed, not read
                sizes = [weights_read(item.layers, table.dims) for item in table.measurements]
                errors: tuple[float, ...] | None = None
                if percentile == PERCENTILES[0] and (found := find_knee(rows, sizes, measured_ms, fit, noise=noise)):
                    knee, errors = found
                if knee is not None:
                    fit = fit_with_knee(rows, sizes, measured_ms, knee, noise=noise)
                    fit = replace(fit, leave_one_out=errors or fit.leave_one_out)
            fits[f"{phase}_p{percentile}"] = fit
    return replace(table, fits=fits)
