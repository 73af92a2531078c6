"""What was asked of `export`, as given and as resolved. All bad settings are reported at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

from amoeba_export.backends.targets import read_target
from amoeba_export.errors import AmoebaError, BadValue, DamagedFile, NotFound, Problems, UnknownName, UsageError
from amoeba_export.formats import FORMATS
from amoeba_export.ir import Budget, Metric, Policy, Shape, SubnetPlan, Target, Workload

DTYPES = ("fp32", "fp16", "bf16", "int8", "int4")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """The settings of one export as a user gives them. None means: the target's default.

    Exactly one of `latency`, `shape` and `plan` chooses the subnet; with `shape` or `plan`, `latency` is a limit to
    check. `target` may be left out only where nothing is to be measured.
    """

    model: str = "demo"
    target: str | None = None
    latency: str | None = None
    metric: str | None = None
    percentile: int = 50
    prompt_tokens: int = 128
    generate_tokens: int = 128
    batch: int = 1
    strategy: Path | None = None
    recipe: str = "quick"
    seed: int = 0
    adapters: tuple[Path, ...] = ()
    shape: str | None = None
    plan: Path | None = None
    policy: str = "uniform"
    formats: tuple[str, ...] | None = None
    dtype: str | None = None
    require_measured: bool = False
    out: Path | None = None
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A request with every name looked up and every value read. `budget` is None when nothing limits the latency."""

    request: ExportRequest
    target: Target | None
    metric: Metric
    budget: Budget | None
    workload: Workload
    shape: Shape | None
    plan: SubnetPlan | None
    policy: Policy
    formats: tuple[str, ...]
    dtype: str | None
    out: Path

    @property
    def align(self) -> int:
        """FFN counts are multiples of this."""
        return self.target.align if self.target else 1

    @property
    def summary(self) -> str:
        """The resolved request in one line, said before any work."""
        request, work = self.request, self.workload
        what = f"plan {request.plan}" if self.plan else f"shape {self.shape}" if self.shape else f"{self.policy} subnet"
        limit = f" within {request.latency} ({self.metric} p{request.percentile})" if self.budget else ""
        where = f" on {self.target.name}" if self.target else ""
        use = f", {work.prompt_tokens}+{work.generate_tokens} tokens, batch {work.batch}" if self.target else ""
        return f"{request.model}: {what}{limit}{where}{use} -> {', '.join(self.formats)} {self.dtype or ''}".rstrip()


def resolve(request: ExportRequest) -> Settings:
    """Look up and read every setting.

    Raises:
        AmoebaError: The problem when there is one; `Problems` that lists them when there are several.
    """
    problems: list[AmoebaError] = []

    def attempt(read: Callable[[], _T]) -> _T | None:
        try:
            return read()
        except AmoebaError as error:
            problems.append(error)
            return None

    target = attempt(lambda: read_target(request.target or "")) if request.target else None
    metric = request.metric or (target.metric if target else "decode")
    for kind, name, known in (
        ("metric", metric, get_args(Metric)),
        ("policy", request.policy, get_args(Policy)),
        *(("format", name, tuple(FORMATS)) for name in request.formats or ()),
        *([("dtype", request.dtype, DTYPES)] if request.dtype else []),
    ):
        if name not in known:
            problems.append(UnknownName(kind, name, known))
    if request.percentile not in (50, 90):
        problems.append(BadValue("--percentile", str(request.percentile), "50 or 90"))
    for flag in ("prompt", "generate", "batch"):
        number = getattr(request, "batch" if flag == "batch" else f"{flag}_tokens")
        if number < 1:
            problems.append(BadValue(f"--{flag}", str(number), "a whole number above 0"))
    workload = Workload(
        prompt_tokens=request.prompt_tokens, generate_tokens=request.generate_tokens, batch=request.batch
    )
    budget = shape = plan = None
    if request.latency is not None:
        latency = request.latency
        budget = attempt(lambda: Budget.parse(latency, metric=metric, percentile=request.percentile))  # type: ignore[arg-type]
    if request.shape is not None:
        text = request.shape
        shape = attempt(lambda: Shape.parse(text))
    if request.plan is not None:
        path = request.plan
        plan = attempt(lambda: read_plan(path))
    problems.extend(_conflicts(request))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)
    formats = request.formats or (target.formats if target else ("safetensors",))
    out = request.out or Path("dist") / default_name(request)
    return Settings(
        request=request,
        target=target,
        metric=metric,  # type: ignore[arg-type]
        budget=budget,
        workload=workload,
        shape=shape,
        plan=plan,
        policy=request.policy,  # type: ignore[arg-type]
        formats=tuple(dict.fromkeys(formats)),
        dtype=request.dtype or (target.dtype if target else None),
        out=out,
    )


def _conflicts(request: ExportRequest) -> list[AmoebaError]:
    problems: list[AmoebaError] = []
    if request.shape and request.plan:
        problems.append(UsageError("--shape and --plan both choose the subnet.", next_step="Give one of them."))
    if not (request.latency or request.shape or request.plan):
        problems.append(
            UsageError(
                "Nothing says how small the subnet should be.",
                next_step="Give --latency (50ms, 75%), --shape (24x0.75) or --plan (a plan.json).",
            )
        )
    if request.latency and not request.target:
        problems.append(
            UsageError(
                "A latency needs a device to hold on.",
                next_step="Give --target; 'amoeba targets' lists them.",
            )
        )
    if request.require_measured and not request.target:
        problems.append(UsageError("--require-measured needs a device.", next_step="Give --target."))
    return problems


def read_plan(path: Path) -> SubnetPlan:
    """Read a `plan.json`, or the plan of an artifact folder. Raises `NotFound`, `DamagedFile`, `InputError`."""
    file = path / "plan.json" if path.is_dir() else path
    if not file.is_file():
        raise NotFound("The plan", file, next_step="Give a plan.json, or the folder of an artifact.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(file, f"it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise DamagedFile(file, "it is not a JSON object")
    return SubnetPlan.from_json(data, where=str(file))


def default_name(request: ExportRequest) -> str:
    """The folder under `dist/` when `--out` is not given: model, target and size, such as `demo-cpu-75pct`."""
    size = (request.latency or request.shape or "plan").replace("%", "pct").replace(" ", "")
    parts = (Path(request.model).name, Path(request.target).stem if request.target else None, size)
    return "-".join(part for part in parts if part)
