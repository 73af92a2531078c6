"""A request with every name looked up and every value read. All bad settings are reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

from amoeba_export.application.request import ExportRequest, ResolvedRequest
from amoeba_export.backends.targets import read_target
from amoeba_export.calibrate import load_recipe
from amoeba_export.errors import AmoebaError, BadValue, NotFound, Problems, UnknownName, UsageError
from amoeba_export.formats import FORMATS
from amoeba_export.ir import Budget, Metric, Policy, RoundingHow, Shape, SubnetPlan, Target, Workload, parse_megabytes
from amoeba_export.ir.dtype import AUTO, DTYPE_NAMES
from amoeba_export.ir.metric import QualityLimit
from amoeba_export.reading import read_json_object
from amoeba_export.reading.bounds import MAX_SIZES
from amoeba_export.refit import HEAL_RECIPE, OFF, HealSettings, load_refit_recipe, shipped_refits

_S = TypeVar("_S")
_T = TypeVar("_T")

ROUNDINGS: tuple[RoundingHow, ...] = get_args(RoundingHow)

DEFAULT_REFIT = "full"
"""What a cut gets when nothing is said."""

MOST_TOKENS = 1_000_000_000
"""Where only the time is limited."""

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TOKENS = {"tok": 1, "ktok": 1000, "Mtok": 1_000_000}


def resolve(request: ExportRequest, *, needs_limit: bool = True) -> ResolvedRequest:
    """Look up and read every setting.

    Args:
        request: What is wanted.
        needs_limit: Whether something must say how small the subnet is.

    Raises:
        AmoebaError: The problem when there is one; `Problems` that lists them when there are several.
    """
    problems: list[AmoebaError] = []

    def attempt(read: Callable[[_S], _T], given: _S | None) -> _T | None:
        """What `read` makes of a setting, None where it is left out; a mistake is kept for the end."""
        try:
            return None if given is None else read(given)
        except AmoebaError as error:
            problems.append(error)
            return None

    target = attempt(read_target, request.target or None)
    metric = request.metric or (target.metric if target else "decode")
    problems += _bad_values(request, metric)
    read_latency = partial(_read_budget, metric=metric, percentile=request.percentile)
    read_speed = partial(Budget.parse_throughput, batch=request.batch, percentile=request.percentile)
    read = [attempt(read_latency, text) for text in request.latency.split(",")] if request.latency is not None else []
    read.append(attempt(read_speed, request.throughput))
    memory_mb = attempt(parse_megabytes, request.memory)
    quality = attempt(QualityLimit.parse_value, request.quality)
    quality = quality or attempt(QualityLimit.parse_loss, request.quality_loss)
    shape = attempt(Shape.parse, request.shape)
    plan = attempt(read_plan, request.plan)
    recipe = attempt(load_recipe, request.recipe if request.strategy is None else None)
    attempt(read_heal, request.heal)
    refit_file = Path(request.refit) if request.refit and is_refit_file(request.refit) else None
    problems += _conflicts(request, needs_limit=needs_limit)
    if problems:
        raise problems[0] if len(problems) == 1 else Problems(problems)
    budgets = tuple(budget for budget in read if budget)
    return ResolvedRequest(
        request=request,
        target=target,
        metric=budgets[0].metric if budgets else metric,  # type: ignore[arg-type]
        budgets=budgets,
        quality=quality,
        memory_limit_mb=min((limit for limit in (memory_mb, target and target.memory_limit_mb) if limit), default=None),
        workload=Workload(
            prompt_tokens=request.prompt_tokens, generate_tokens=request.generate_tokens, batch=request.batch
        ),
        shape=shape,
        plan=plan,
        policy=request.policy,  # type: ignore[arg-type]
        recipe=recipe,
        formats=tuple(dict.fromkeys(request.formats or (target.formats if target else ("safetensors",)))),
        dtype=request.dtype or default_dtype(request, target),
        refit=DEFAULT_REFIT if refit_file else refit_of(request),
        refit_file=refit_file,
        heal=heal_of(request),
        out=request.out or Path("dist") / default_name(request),
    )


def searched_dtype(request: ExportRequest) -> str | None:
    """The precision that a search of `request` has a cost table of; `auto` where several are weighed."""
    return request.dtype or default_dtype(request, read_target(request.target) if request.target else None)


def default_dtype(request: ExportRequest, target: Target | None) -> str | None:
    """The precision where none is named: searched among those of the target, or the first of them for a given plan."""
    if target is None:
        return None
    is_search = not (request.shape or request.plan)
    return AUTO if is_search and len(target.dtypes) > 1 else target.dtype


def _bad_values(request: ExportRequest, metric: str) -> list[AmoebaError]:
    """Names that nothing has, and numbers that cannot be."""
    problems: list[AmoebaError] = []
    names = [("metric", metric, get_args(Metric)), ("policy", request.policy, get_args(Policy))]
    names += [("format", name, tuple(FORMATS)) for name in request.formats or ()]
    names += [("rounding", request.rounding, ROUNDINGS)] if request.rounding else []
    names += [("dtype", request.dtype, (*DTYPE_NAMES, AUTO))] if request.dtype else []
    problems += [UnknownName(kind, name, known) for kind, name, known in names if name not in known]
    for check, given in ((check_refit, refit_of(request)), (check_vocabulary, request.vocab_keep)):
        try:
            if given is not None:
                check(given)
        except AmoebaError as error:
            problems.append(error)
    for path in request.calibration_data:  # a refit that nobody asked for is skipped where texts cannot be used
        if not path.is_file():
            problems.append(NotFound("A text of --calibration-data", path, next_step="Give a .txt or .jsonl file."))
    if request.heal not in (None, OFF) and request.refit == OFF:
        problems.append(BadValue("--heal", request.heal, "used with a refit: it starts there"))
    if request.percentile not in (50, 90):
        problems.append(BadValue("--percentile", str(request.percentile), "50 or 90"))
    counts = {"prompt": request.prompt_tokens, "generate": request.generate_tokens, "batch": request.batch}
    problems += [
        BadValue(f"--{flag}", str(number), "a whole number above 0") for flag, number in counts.items() if number < 1
    ]
    return problems


def read_heal(text: str) -> HealSettings | None:
    """Read `20m`, `90s` or `1h`, a number of tokens such as `2Mtok` or `500ktok`, or `off`. Raises `BadValue`."""
    if text == OFF:
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(s|m|h|tok|ktok|Mtok)", text.strip())
    if not match or not float(match[1]):
        raise BadValue("--heal", text, "a time such as 20m, tokens such as 2Mtok, or off")
    number, unit = float(match[1]), match[2]
    if unit in _SECONDS:
        return HealSettings(tokens=MOST_TOKENS, seconds=number * _SECONDS[unit])
    return HealSettings(tokens=max(1, round(number * _TOKENS[unit])))


def check_vocabulary(text: str) -> None:
    """Raise `BadValue` or `NotFound` for what can be no `--vocab-keep`."""
    wanted = "a number of tokens, a text (.txt or .jsonl) whose tokens are kept, or a list of token ids (.json)"
    if text.isdecimal():
        if not 0 < float(text) <= MAX_SIZES["vocab_size"]:
            raise BadValue("--vocab-keep", text, wanted)
    elif not Path(text).is_file():
        raise NotFound("The vocabulary", text, next_step=f"Give {wanted}.")


def refit_of(request: ExportRequest) -> str:
    """`off`, a recipe's name, or a file: what is asked for, or what a cut gets when nothing is said."""
    return request.refit or DEFAULT_REFIT


def heal_of(request: ExportRequest) -> HealSettings | None:
    """How long a cut is distilled: as asked for, or as the recipe of its refit says; None where it is not."""
    if request.heal is not None:
        return read_heal(request.heal)
    refit = refit_of(request)
    tokens = 0 if refit == OFF or is_refit_file(refit) else load_refit_recipe(refit).heal_tokens
    return HealSettings(tokens=tokens) if tokens else None


def is_refit_file(text: str) -> bool:
    """Whether `--refit` names a file, and not a recipe."""
    return text.endswith(".safetensors")


def check_refit(text: str) -> None:
    """Raise `UnknownName` for what is neither `off`, a shipped recipe nor a file."""
    known = (OFF, *(name for name in shipped_refits() if name != HEAL_RECIPE))
    if not is_refit_file(text) and text not in known:
        raise UnknownName("refit", text, known)


def _read_budget(text: str, metric: str, percentile: int) -> Budget:
    """`50ms`, or `prefill=50ms` for a metric of its own."""
    name, equals, value = text.rpartition("=")
    if equals and name.strip() not in get_args(Metric):
        raise UnknownName("metric", name.strip(), get_args(Metric))
    return Budget.parse(value, metric=name.strip() if equals else metric, percentile=percentile)  # type: ignore[arg-type]


def _conflicts(request: ExportRequest, *, needs_limit: bool) -> list[AmoebaError]:
    problems: list[AmoebaError] = []
    given = {"--shape": request.shape, "--plan": request.plan, "--pick": request.pick}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        both = "both" if len(named) == 2 else "all"
        problems.append(UsageError(f"{' and '.join(named)} {both} choose the subnet.", next_step="Give one of them."))
    limited = request.latency or request.throughput or request.quality or request.quality_loss
    if request.quality and request.quality_loss:
        problems.append(UsageError("--quality and --quality-loss are the same limit.", next_step="Give one of them."))
    if needs_limit and not (limited or named):
        problems.append(
            UsageError(
                "Nothing says how small the subnet should be.",
                next_step="Give --latency (50ms, 75%), --throughput (30tok/s), --quality-loss (5%), --shape (24x0.75) "
                "or --plan (a file).",
            )
        )
    if request.pick is not None and request.pick < 1:
        problems.append(BadValue("--pick", str(request.pick), "a number that 'amoeba frontier' shows"))
    if (limited or request.memory or request.pick or not needs_limit) and not request.target:
        problems.append(
            UsageError(
                "A limit needs a device to hold on.",
                next_step="Give --target; 'amoeba targets' lists them.",
            )
        )
    if request.refit and is_refit_file(request.refit) and not (request.shape or request.plan or request.pick):
        problems.append(
            UsageError(
                "--refit FILE has the weights of one cut, and a search may choose another.",
                next_step="Give the --plan or --shape that it was made for.",
            )
        )
    is_search = not (request.shape or request.plan) and (limited or request.pick or not needs_limit)
    if request.dtype == AUTO and not is_search:
        problems.append(
            UsageError(
                "--dtype auto is a search, and there is nothing to search under.",
                next_step="Give --latency, --throughput or --quality, without --shape or --plan; or name a --dtype.",
            )
        )
    if request.require_measured and not request.target:
        problems.append(UsageError("--require-measured needs a device.", next_step="Give --target."))
    return problems


def read_plan(path: Path) -> SubnetPlan:
    """Read a `plan.json`, the plan in what `search --json` printed, or that of an artifact folder.

    Raises:
        InputError: It is not there, not JSON, or not a plan.
    """
    file = path / "plan.json" if path.is_dir() else path
    data = read_json_object(file, what="The plan", missing="Give a plan.json, or the folder of an artifact.")
    return SubnetPlan.from_json(data.get("plan", data), where=str(file))


def default_name(request: ExportRequest) -> str:
    """The folder under `dist/` when `--out` is not given: model, target and size, such as `demo-cpu-75pct`."""
    picked = f"pick-{request.pick}" if request.pick else None
    quality = f"quality-{request.quality}" if request.quality else None
    loss = f"loss-{request.quality_loss}" if request.quality_loss else None
    size = request.latency or request.throughput or request.shape or picked or quality or loss or "plan"
    for mark, word in (("%", "pct"), ("/", "-per-"), ("=", "-"), (",", "-"), (" ", "")):
        size = size.replace(mark, word)
    parts = (Path(request.model).name, Path(request.target).stem if request.target else None, size)
    return "-".join(part for part in parts if part)
