"""Every limit in the target files that amoeba ships: a search under it stays inside, a plan outside is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export import ExportRequest
from amoeba_export.application.assemble import write_plan
from amoeba_export.application.pipeline import search
from amoeba_export.backends.target_file import write_target
from amoeba_export.backends.targets import list_targets
from amoeba_export.errors import AmoebaError, OutsideLimits
from amoeba_export.formats import FORMATS
from amoeba_export.formats.gguf.architecture import able_architectures
from amoeba_export.ir import NO_LIMITS, RuntimeLimits, Shape, SubnetPlan, Supernet, Target
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet, read_strategy
from amoeba_export.load.families import read_architecture
from amoeba_export.load.family_file import read_family
from tests.families.configs import FAMILIES, VARIANTS, config_of
from tests.search.strategies import write_graded
from tests.tiny import save_tiny, tiny_config

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
}
NARROW = {**WIDE, "hidden_size": 160}
FIGURES = {
    "bandwidth_gb_s": 1,
    "bandwidth_efficiency": 1,
    "compute_tflops": 1,
    "per_layer_ms": 0.001,
    "uncertainty": 0.1,
}


def _distinct() -> dict[RuntimeLimits, Target]:
    """One target for each set of limits that is shipped."""
    return {target.limits: target for target in list_targets().values() if target.limits != NO_LIMITS}


TARGETS = {target.name: target for target in _distinct().values()}


@dataclasses.dataclass(frozen=True)
class Outside:
    """A plan that breaks one rule: of which model, and what the refusal says."""

    model: str
    plan: Callable[[Supernet], SubnetPlan]
    said: str


def _cut(width: float, *, align: int, head_multiple: int = 1) -> Callable[[Supernet], SubnetPlan]:
    def plan(supernet: Supernet) -> SubnetPlan:
        assert supernet.strategy
        plain = dataclasses.replace(supernet.strategy, compensates=False)
        rules = CutRules(align=align, head_multiple=head_multiple)
        return derive_plan(plain, supernet.architecture, Shape(3, width), rules)

    return plan


def _compensated(supernet: Supernet) -> SubnetPlan:
    assert supernet.strategy
    return derive_plan(supernet.strategy, supernet.architecture, Shape(3, 0.5), CutRules(align=128, head_multiple=4))


def _mixed(supernet: Supernet) -> SubnetPlan:
    plan = supernet.full_plan()
    short = dataclasses.replace(plan.layers[0], ffn=plan.layers[0].ffn[:256])
    return dataclasses.replace(plan, policy="adaptive", layers=(short, *plan.layers[1:]))


OUTSIDE: dict[str, Outside] = {
    "ffn_multiple": Outside("llama", _cut(0.6, align=32, head_multiple=4), r"an FFN of \d+ is no multiple of 128"),
    "query_multiple": Outside("llama", _cut(0.7, align=128), "heads of 32 are no multiple of 128"),
    "hidden_multiple": Outside("narrow", lambda one: one.full_plan(), "a hidden size of 160 is no multiple of 128"),
    "output_biases": Outside("qwen3", _compensated, "biases on o_proj or down_proj of a qwen3 are not computed"),
    "uniform": Outside("llama", _mixed, "layers differ in their dims"),
}
UNUSED = {"hidden_by_heads": "no target that is shipped has it: tests/application/test_loadable.py"}
NO_RULES = {"runtime", "multiples_of"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("limited")
    made = {"llama": ("llama", WIDE), "narrow": ("llama", NARROW), "qwen3": ("qwen3", WIDE)}
    for name, (family, sizes) in made.items():
        save_tiny(root / name, family, **sizes)
        write_graded(root / name, root / f"{name}.safetensors")
    return {name: root / name for name in made}


def request_for(target: Target, model: Path, folder: Path, dtype: str, **asked: object) -> ExportRequest:
    """Of an estimated target with the same limits, precisions and container."""
    file = folder / "board.toml"
    file.unlink(missing_ok=True)
    write_target(dataclasses.replace(target, backend="analytic", options=FIGURES, on_device={}, aliases=()), file)
    return ExportRequest(
        model=str(model), strategy=model.with_suffix(".safetensors"), target=str(file), dtype=dtype, **asked
    )  # type: ignore[arg-type]


def dtype_of(target: Target, *, limited: bool = True) -> str:
    """A precision of the container in which the multiples hold, or do not."""
    held = [one for one in target.dtypes if one in FORMATS[target.formats[0]].dtypes]
    return next(one for one in held if not target.limits.multiples_of or (one in target.limits.multiples_of) is limited)


def rules_of(limits: RuntimeLimits) -> set[str]:
    """What is not as it is without limits."""
    plain = dataclasses.asdict(NO_LIMITS)
    return {key for key, value in dataclasses.asdict(limits).items() if value != plain[key]} - NO_RULES


def test_no_limit_is_without_a_test() -> None:
    fields = {field.name for field in dataclasses.fields(RuntimeLimits)} - NO_RULES
    assert fields == {*OUTSIDE, *UNUSED}
    shipped = {rule for target in TARGETS.values() for rule in rules_of(target.limits)}
    assert shipped == {*OUTSIDE}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("policy", ["uniform", "adaptive"])
def test_a_search_stays_inside(name: str, policy: str, models: dict[str, Path], tmp_path: Path) -> None:
    """In fp16, where the multiples are made to hold: rounding a model of this size says nothing."""
    limits = dataclasses.replace(TARGETS[name].limits, multiples_of=())
    target = dataclasses.replace(TARGETS[name], limits=limits)
    result = search(request_for(target, models["llama"], tmp_path, "fp16", latency="85%", policy=policy))
    dense = result.plan.dense(result.supernet.architecture)
    assert dense != result.supernet.architecture.uncut
    assert limits.problems(dense, "fp16") == []


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.limits.output_biases is not None])
def test_a_search_makes_no_biases_that_the_runtime_drops(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    request = request_for(TARGETS[name], models["qwen3"], tmp_path, "fp16", latency="85%", formats=("safetensors",))
    result = search(request)
    dense = result.plan.dense(result.supernet.architecture)
    assert request.strategy is not None
    assert read_strategy(request.strategy).compensation != "none"
    assert not any(layer.o_bias or layer.down_bias for layer in dense.layers)
    assert dense != result.supernet.architecture.uncut


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.limits.hidden_multiple > 1])
def test_no_search_finds_a_cut_of_a_hidden_size_that_is_not_loaded(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    limits = dataclasses.replace(TARGETS[name].limits, multiples_of=())
    target = dataclasses.replace(TARGETS[name], limits=limits)
    with pytest.raises(AmoebaError, match="hidden size of 160 is no multiple of 128"):
        search(request_for(target, models["narrow"], tmp_path, "fp16", latency="85%"))


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.limits.runtime == "llama.cpp"])
def test_llama_cpp_has_the_biases_that_gguf_files_have(name: str) -> None:
    """The target asks for no less than the container: of a family, it holds what any model of it may have."""
    configs = [config_of(family) for family in FAMILIES | VARIANTS]
    configs += [tiny_config(family) for family in ("llama", "mistral", "qwen2", "qwen3")]
    held: dict[str, bool] = {}
    for config in configs:
        model, _ = read_architecture(config.to_dict(), where=Path("config.json"))
        may_have = bool(able_architectures(model.uncut)) and FORMATS["gguf"].limits(model).output_biases
        held[model.family] = held.get(model.family, False) or may_have
    taken = {family for family in held if TARGETS[name].limits.takes_output_biases(family)}
    assert all(held[family] for family in taken)
    named = {family for family in held if read_family(family).containers.get("gguf", {}).get("architectures")}
    assert taken & named == {family for family in named if held[family]}


BROKEN = [(name, rule) for name, target in TARGETS.items() for rule in sorted(rules_of(target.limits))]


@pytest.mark.parametrize(("name", "rule"), BROKEN)
def test_a_plan_outside_is_refused(name: str, rule: str, models: dict[str, Path], tmp_path: Path) -> None:
    target, outside = TARGETS[name], OUTSIDE[rule]
    model = models[outside.model]
    supernet = load_supernet(str(model), strategy=model.with_suffix(".safetensors"))
    write_plan(outside.plan(supernet), tmp_path)
    formats = {"formats": ("safetensors",)} if outside.model == "qwen3" else {}  # GGUF refuses such biases itself
    dtype = "fp16" if formats else dtype_of(target)
    request = request_for(target, model, tmp_path, dtype, plan=tmp_path / "plan.json", **formats)
    with pytest.raises(OutsideLimits, match=outside.said) as caught:
        search(request)
    assert caught.value.exit_code == 7
    assert f"{target.limits.runtime} of target 'board' does not load this plan" in str(caught.value)
    if rule.endswith("_multiple") and target.limits.multiples_of:
        free = dataclasses.replace(target, limits=dataclasses.replace(target.limits, uniform=False))
        search(request_for(free, model, tmp_path, dtype_of(target, limited=False), plan=tmp_path / "plan.json"))
