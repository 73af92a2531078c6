from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_export import ExportRequest, backends, export, load_supernet
from amoeba_export.application import pipeline, trials, wholes
from amoeba_export.application.outcome import Outcome
from amoeba_export.application.rounding import Rounding
from amoeba_export.application.session import Session
from amoeba_export.artifact import read_manifest, sha256_file, verify_checksums
from amoeba_export.cli.app import main
from amoeba_export.errors import (
    AmoebaError,
    BudgetMissed,
    EstimateRefused,
    MemoryExceeded,
    NothingFits,
    NumbersDiffer,
    OutputExists,
    Problems,
)
from amoeba_export.evaluate import QualityFile, ShapeQuality
from amoeba_export.ir import Budget, Shape
from amoeba_export.load import read_strategy, write_strategy
from amoeba_export.verify import masked_logits
from tests import imaginary
from tests.listener import Listener
from tests.search.strategies import write_graded


@pytest.fixture
def model(tiny_dirs: dict[str, Path]) -> Path:
    return tiny_dirs["llama"]


@pytest.fixture
def strategy(model: Path, tmp_path: Path) -> Path:
    return write_graded(model, tmp_path / "strategy.safetensors")


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "imaginary": "tests.imaginary:BACKEND"})
    imaginary.BACKEND.measured_artifacts.clear()
    return write_target(tmp_path)


def write_target(
    folder: Path,
    artifact_factor: float = 1.0,
    scatter: Sequence[float] = (0.0,),
    dtypes: Mapping[str, float] = MappingProxyType({"fp32": 1.0}),
) -> Path:
    """A machine that runs `dtypes`, each in such a share of the time of fp32."""
    path = folder / "imaginary.toml"
    options = f"[options]\nartifact_factor = {artifact_factor}\nscatter = {list(scatter)}\n"
    options += "".join(f"dtype_factors.{dtype} = {factor}\n" for dtype, factor in dtypes.items())
    head = f'description = "a rule"\nbackend = "imaginary"\nalign = 8\ndtype = {list(dtypes)}\n'
    path.write_text(head + options)
    return path


def test_an_artifact_is_complete_and_computes_what_it_should(model: Path, strategy: Path, tmp_path: Path):
    out = tmp_path / "out"
    request = ExportRequest(
        model=str(model), strategy=strategy, shape="3x0.5", formats=("safetensors", "onnx"), out=out
    )
    result = export(request)
    manifest = verify_checksums(out)
    assert manifest == result.manifest
    assert {entry.path for entry in manifest.files} >= {"plan.json", "safetensors/config.json", "onnx/model.onnx"}
    assert (manifest.shape.depth, manifest.shape.width, manifest.latency) == (3, 0.5, None)
    assert [item.role for item in manifest.inputs] == ["model", "strategy"]
    assert manifest.verification is not None
    assert manifest.verification.greedy_tokens_equal
    tokens = torch.arange(3, 19)[None]
    dense = AutoModelForCausalLM.from_pretrained(out / "safetensors", dtype=torch.float32)(tokens).logits
    assert torch.allclose(dense, masked_logits(result.supernet, result.plan, tokens), atol=1e-4)


def test_the_plan_of_an_artifact_gives_the_same_bytes_again(model: Path, strategy: Path, tmp_path: Path):
    first = export(ExportRequest(model=str(model), strategy=strategy, shape="3x0.5", out=tmp_path / "a"))
    again = export(ExportRequest(model=str(model), strategy=strategy, plan=tmp_path / "a", out=tmp_path / "b"))
    assert first.manifest is not None
    assert again.manifest is not None
    assert first.manifest.files == again.manifest.files


def test_a_budget_is_kept_when_measured(model: Path, strategy: Path, target: Path, tmp_path: Path):
    """Artifacts run 8 % slower than the graphs of the cost table: the first choice misses, a later one does not."""
    write_target(tmp_path, artifact_factor=1.08)
    request = ExportRequest(
        model=str(model), strategy=strategy, target=str(target), latency="80%", out=tmp_path / "out"
    )
    result = export(request)
    assert result.manifest is not None
    assert result.fitted is not None
    latency = result.manifest.latency
    assert latency is not None
    assert latency.source == "measured"
    assert latency.measured_ms is not None
    assert latency.budget_ms == pytest.approx(0.8 * result.fitted.full.decode.p50_ms)  # type: ignore[union-attr]
    assert 0.9 * latency.budget_ms < latency.measured_ms["p50"] <= latency.budget_ms
    assert len(imaginary.BACKEND.measured_artifacts) > 1
    assert result.plan.dense(result.supernet.architecture) in imaginary.BACKEND.measured_artifacts


def test_what_is_too_close_to_call_is_measured_longer(model: Path, strategy: Path, target: Path, tmp_path: Path):
    """Rounds that are 4 % slower and faster by chance cannot tell what is 2 % below the limit from what is above it."""
    request = ExportRequest(model=str(model), strategy=strategy, target=str(target), latency="72%")
    decided = export(dataclasses.replace(request, out=tmp_path / "decided")).fitted
    assert decided is not None
    assert decided.latency is not None
    assert decided.limit_ms is not None
    assert len(decided.latency.rounds) == 5
    assert trials.GOOD_USE * decided.limit_ms <= decided.latency.decode.p50_ms <= decided.limit_ms
    write_target(tmp_path, scatter=(0.04, 0, -0.04, 0))
    listener = Listener()
    longer = export(dataclasses.replace(request, out=tmp_path / "longer"), progress=listener).fitted
    assert "Too close to call after 5 rounds: measuring more." in listener.notes
    assert any(note.endswith("Too close to it to be sure.") for note in listener.notes)
    assert longer is not None
    assert longer.latency is not None
    assert longer.full is not None
    assert longer.latency.decode.p50_ms < decided.latency.decode.p50_ms
    assert Outcome(budgets=(Budget.parse("72%"),), full=longer.full, latency=longer.latency).is_kept


@pytest.mark.parametrize(("scatter", "num_rounds"), [((0.01, 0, -0.01, 0), 3), ((0.15, 0, -0.15, 0), 5)])
def test_what_is_far_below_its_budget_is_measured_in_three_rounds(
    model: Path, strategy: Path, target: Path, tmp_path: Path, scatter: Sequence[float], num_rounds: int
):
    """Where rounds scatter so much that three do not tell, in five."""
    write_target(tmp_path, scatter=scatter)
    request = ExportRequest(
        model=str(model), strategy=strategy, target=str(target), shape="3x0.5", latency="80%", out=tmp_path / "out"
    )
    fitted = export(request).fitted
    assert fitted is not None
    assert fitted.latency is not None
    assert len(fitted.latency.rounds) == num_rounds


def test_a_search_whose_builds_are_all_over_names_the_fastest(
    model: Path, strategy: Path, target: Path, tmp_path: Path
):
    """Artifacts run 60 % slower than the graphs of the cost table: what it lets through, measuring refuses."""
    write_target(tmp_path, artifact_factor=1.6)
    out = tmp_path / "out"
    with pytest.raises(BudgetMissed) as caught:
        export(ExportRequest(model=str(model), strategy=strategy, target=str(target), latency="55%", out=out))
    assert len(imaginary.BACKEND.measured_artifacts) >= 1
    assert caught.value.next_step is not None
    assert caught.value.next_step.endswith("or calibrate with more removed layers or smaller widths.")
    assert not out.exists()


def test_where_nothing_can_be_shown_to_keep_it_what_seems_to_is_taken(
    model: Path, strategy: Path, target: Path, tmp_path: Path
):
    """Rounds of plus and minus 60 %: no interval lies below the limit, the median of some subnet does."""
    write_target(tmp_path, scatter=(0.6, 0, -0.6, 0))
    listener = Listener()
    request = ExportRequest(
        model=str(model), strategy=strategy, target=str(target), latency="50%", out=tmp_path / "out"
    )
    fitted = export(request, progress=listener).fitted
    assert fitted is not None
    assert fitted.latency is not None
    assert fitted.full is not None
    outcome = Outcome(budgets=(Budget.parse("50%"),), full=fitted.full, latency=fitted.latency)
    assert outcome.use <= 1
    assert not outcome.is_kept
    assert listener.warnings[-1].endswith(
        f"rounds do not show that any subnet keeps the budget. {fitted.plan.shape} is taken, which does by its median."
    )


def test_a_given_shape_is_refused_after_all_rounds_at_the_earliest(
    model: Path, strategy: Path, target: Path, tmp_path: Path
):
    """Its first five rounds look 3 % slow under a budget that is 1 % more than it takes: too few to refuse it."""
    request = ExportRequest(model=str(model), strategy=strategy, target=str(target), shape="3x0.5", out=tmp_path / "a")
    known = export(request).fitted
    assert known is not None
    assert known.latency is not None
    assert known.full is not None
    share = 101 * known.latency.decode.p50_ms / known.full.decode.p50_ms
    write_target(tmp_path, scatter=(0.03, -0.03))
    listener = Listener()
    with pytest.raises(BudgetMissed):
        export(dataclasses.replace(request, latency=f"{share:.3f}%", out=tmp_path / "b"), progress=listener)
    more = [note for note in listener.notes if note.startswith("Too close to call")]
    assert len(more) == 2  # after 5 and after 10


def test_a_given_shape_over_the_memory_limit_is_refused_before_it_is_built(
    model: Path, strategy: Path, target: Path, tmp_path: Path
):
    request = ExportRequest(
        model=str(model), strategy=strategy, target=str(target), shape="3x0.5", memory="0.4MiB", out=tmp_path / "out"
    )
    with pytest.raises(MemoryExceeded) as caught:
        export(request)
    assert re.fullmatch(r"The subnet 3x0\.5 occupies [\d.]+ MiB; the limit is 0\.4 MiB\.", caught.value.what)
    assert not imaginary.BACKEND.measured_artifacts and not request.out.exists()  # type: ignore[union-attr]
    assert export(dataclasses.replace(request, memory="4MiB")).plan.shape == Shape(3, 0.5)


def test_what_is_measured_refines_the_cost_table(model: Path, strategy: Path, target: Path, tmp_path: Path):
    """Artifacts run 8 % slower than graphs. Having built some, the next search for another budget knows better."""
    write_target(tmp_path, artifact_factor=1.08)
    request = ExportRequest(model=str(model), strategy=strategy, target=str(target), latency="80%")
    before = pipeline.search(request).search
    assert before is not None
    export(dataclasses.replace(request, out=tmp_path / "a"))
    after = pipeline.search(request).search
    assert after is not None
    at = {one.shape: one.predicted_ms for one in before.candidates}
    built = read_manifest(tmp_path / "a").shape
    shape = Shape(built.depth, built.width)
    now = next(one.predicted_ms for one in after.candidates if one.shape == shape)
    assert now > 1.001 * at[shape]


def test_a_budget_that_nothing_meets_leaves_nothing(model: Path, strategy: Path, target: Path, tmp_path: Path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(NothingFits) as caught:
        export(ExportRequest(model=str(model), strategy=strategy, target=str(target), latency="0.001ms", out=out))
    assert caught.value.exit_code == 4
    assert not out.parent.exists()


def test_every_budget_holds(model: Path, strategy: Path, target: Path, tmp_path: Path):
    """Prefill takes five times decode here: the speed asked for is the tighter limit."""
    common = ExportRequest(model=str(model), strategy=strategy, target=str(target), latency="prefill=100%")
    full = pipeline.search(dataclasses.replace(common, latency="100%")).search
    assert full is not None
    tokens_per_second = 1000 / (0.7 * full.limits[0][1])
    request = dataclasses.replace(common, throughput=f"{tokens_per_second:.3f}tok/s", out=tmp_path / "out")
    result = export(request)
    assert result.fitted is not None
    assert result.fitted.latency is not None
    assert result.fitted.full is not None
    assert result.settings.metric == "prefill"
    assert 0.6 < result.fitted.latency.decode.p50_ms / result.fitted.full.decode.p50_ms <= 0.7


FASTER = {"fp32": 1.0, "int8": 0.5, "int4": 0.3}
RISES = {"fp32": 0.0, "int8": 0.01, "int4": 0.3}


def rounding_of(session: Session, *, with_data: bool = True) -> Rounding:
    return Rounding(rise=RISES[session.dtype], loss=None)


@pytest.fixture
def precisions(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that is faster in coarser precisions, each of which costs a known loss. The full model's is 4."""
    monkeypatch.setattr(wholes, "measure_rounding", rounding_of)
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    return write_target(tmp_path, dtypes=FASTER)


@pytest.mark.parametrize(
    ("latency", "dtype", "is_whole", "tables"),
    [
        pytest.param("75%", "int8", True, 0, id="the whole model in int8 costs next to nothing: no table is measured"),
        pytest.param("48%", "int8", False, 1, id="a subnet in int8 is better than the whole model in int4"),
        pytest.param("33%", "int4", True, 0, id="only int4 leaves the model whole, and no cut of int8 is better"),
        pytest.param("25%", "int4", False, 1, id="only a subnet in int4"),
    ],
)
def test_shape_and_precision_are_chosen_together(
    model: Path, strategy: Path, precisions: Path, tmp_path: Path, latency: str, dtype: str, is_whole: bool, tables: int
):
    result = pipeline.search(
        ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency=latency)
    )
    assert result.settings.dtype == dtype
    assert (result.plan.shape == Shape(4, 1.0)) == is_whole
    found = tmp_path / "cache" / "cost-tables"
    assert (len(list(found.iterdir())) if found.is_dir() else 0) <= tables + 1
    if not tables and dtype == "int8":
        assert not found.exists()


def test_a_machine_that_is_slower_than_it_was_is_no_faster_in_other_precisions(
    model: Path, strategy: Path, precisions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The full model's figures are in the cache, and a share of today's is more than fp32 took then."""
    request = ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency="75%")
    pipeline.search(request)
    monkeypatch.setattr(imaginary.BACKEND, "pace", 12.0)
    result = export(dataclasses.replace(request, out=tmp_path / "out"))
    fitted, manifest = result.fitted, result.manifest
    assert fitted is not None and fitted.full is not None and manifest is not None
    assert (fitted.session.dtype, len(imaginary.BACKEND.measured_artifacts)) == ("int8", 1)
    full_ms = fitted.full.of("decode")
    assert [one.latency_ms for one in manifest.reference] == pytest.approx([full_ms, 0.5 * full_ms, 0.3 * full_ms])


@pytest.mark.parametrize(
    ("latency", "rounded", "int4"),
    [
        pytest.param("75%", [], ("nearest", 4.3), id="the whole model in int8 is chosen: int4 is for comparison"),
        pytest.param("48%", ["int4"], ("data", 4.2), id="a subnet in int8 is weighed against int4"),
    ],
)
def test_integers_are_chosen_with_data_only_where_that_may_change_the_choice(
    model: Path,
    strategy: Path,
    precisions: Path,
    monkeypatch: pytest.MonkeyPatch,
    latency: str,
    rounded: list[str],
    int4: tuple[str, float],
):
    asked: list[str] = []

    def measured(session: Session, *, with_data: bool = True) -> Rounding:
        if session.dtype != "int4":
            return rounding_of(session)
        asked.extend(["int4"] if with_data else [])
        return Rounding(rise=0.2 if with_data else 0.3, loss=None, how="data" if with_data else "nearest")

    monkeypatch.setattr(wholes, "measure_rounding", measured)
    request = ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency=latency)
    result = pipeline.search(request)
    assert asked == rounded
    *finer, coarse = result.reference
    assert (coarse.rounding, coarse.quality) == (int4[0], pytest.approx({"loss": int4[1]}))
    assert [one.rounding for one in finer] == [None, None]


def test_a_whole_model_whose_integers_can_be_chosen_is_judged_with_them(
    model: Path, strategy: Path, precisions: Path, monkeypatch: pytest.MonkeyPatch
):
    """Even where rounding to nearest loses next to nothing: what is said of it is what is exported."""

    def measured(session: Session, *, with_data: bool = True) -> Rounding:
        if session.dtype == "int4":
            return Rounding(rise=0.01 if with_data else 0.015, loss=None, how="data" if with_data else "nearest")
        return Rounding(rise=0.0 if session.dtype == "fp32" else 0.5, loss=None)

    monkeypatch.setattr(wholes, "measure_rounding", measured)
    request = ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency="75%")
    result = pipeline.search(request)
    assert result.settings.dtype == "int4"
    assert (result.reference[-1].rounding, result.reference[-1].quality) == ("data", pytest.approx({"loss": 4.01}))


def test_an_artifact_is_compared_with_the_full_model_in_every_precision(
    model: Path, strategy: Path, precisions: Path, tmp_path: Path
):
    request = ExportRequest(
        model=str(model), strategy=strategy, target=str(precisions), latency="60%", out=tmp_path / "out"
    )
    manifest = export(request).manifest
    assert manifest is not None
    assert read_manifest(tmp_path / "out") == manifest
    assert (manifest.dtype, manifest.shape.shape) == ("int8", Shape(4, 1.0))
    assert manifest.quality == pytest.approx({"loss": 4.01, "loss_full": 4.0})
    assert manifest.latency is not None
    assert manifest.latency.full_dtype == "fp32"
    full_ms = manifest.reference[0].latency_ms
    assert manifest.latency.measured_ms is not None
    assert manifest.latency.measured_ms["p50"] == pytest.approx(0.5 * full_ms)
    assert [(one.dtype, one.keeps_budget) for one in manifest.reference] == [
        ("fp32", False),
        ("int8", True),
        ("int4", True),
    ]
    assert [one.latency_ms / full_ms for one in manifest.reference] == pytest.approx([1, 0.5, 0.3])
    assert [one.quality for one in manifest.reference] == [
        pytest.approx({"loss": 4.0 + rise}) for rise in RISES.values()
    ]


def test_a_subnet_in_a_coarser_precision_is_built_and_measured(
    model: Path, strategy: Path, precisions: Path, tmp_path: Path
):
    """Artifacts run 8 % slower than graphs: the loop corrects int4 beside the full model in fp32."""
    write_target(tmp_path, artifact_factor=1.08, dtypes=FASTER)
    request = ExportRequest(
        model=str(model), strategy=strategy, target=str(precisions), latency="25%", out=tmp_path / "out"
    )
    result = export(request)
    assert result.manifest is not None
    latency = result.manifest.latency
    assert latency is not None
    assert latency.measured_ms is not None
    assert latency.budget_ms is not None
    assert result.manifest.dtype == "int4"
    assert latency.budget_ms == pytest.approx(0.25 * result.fitted.full.decode.p50_ms)  # type: ignore[union-attr]
    assert 0.9 * latency.budget_ms < latency.measured_ms["p50"] <= latency.budget_ms


def test_where_every_precision_takes_as_long_the_finest_stays(
    model: Path, strategy: Path, precisions: Path, tmp_path: Path
):
    write_target(tmp_path, dtypes=dict.fromkeys(FASTER, 1.0))
    request = ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency="80%")
    assert pipeline.search(request).settings.dtype == "fp32"


def test_a_dtype_that_is_named_is_kept_and_is_what_a_share_refers_to(
    model: Path, strategy: Path, precisions: Path, tmp_path: Path
):
    common = ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency="75%", dtype="int4")
    result = export(dataclasses.replace(common, out=tmp_path / "out"))
    assert result.manifest is not None
    assert result.manifest.latency is not None
    assert (result.manifest.dtype, result.manifest.latency.full_dtype) == ("int4", "int4")
    assert result.plan.shape < Shape(4, 1.0)
    assert [one.dtype for one in result.reference] == ["int4", "fp32", "int8"]


def test_what_no_precision_keeps_is_said_with_the_fastest(model: Path, strategy: Path, precisions: Path):
    with pytest.raises(NothingFits) as caught:
        pipeline.search(ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency="2%"))
    assert caught.value.exit_code == 4
    assert "the closest, 2x0.5 in int4, reaches " in caught.value.what
    assert caught.value.next_step is not None
    assert caught.value.next_step.startswith("Allow ")


def test_a_precision_that_fails_is_left_out(
    model: Path, strategy: Path, precisions: Path, monkeypatch: pytest.MonkeyPatch
):
    def measured(session: Session, *, with_data: bool = True) -> Rounding:
        if session.dtype == "int8":
            raise NumbersDiffer(Path("onnx"), ["the KL divergence is 9 nats per token (limit 0.05)"])
        return Rounding(rise=RISES[session.dtype], loss=None)

    monkeypatch.setattr(wholes, "measure_rounding", measured)
    listener = Listener()
    request = ExportRequest(model=str(model), strategy=strategy, target=str(precisions), latency="33%")
    result = pipeline.search(request, progress=listener)
    assert result.settings.dtype == "int4"
    assert [one.dtype for one in result.reference] == ["fp32", "int4"]
    assert any(note.startswith("int8 is left out. ") for note in listener.notes)


def test_memory_may_be_limited(model: Path, strategy: Path, target: Path):
    common = ExportRequest(model=str(model), strategy=strategy, target=str(target), latency="100%")
    free = pipeline.search(common).search
    assert free is not None
    assert free.best.memory_mb is not None
    less = pipeline.search(dataclasses.replace(common, memory=f"{free.best.memory_mb - 0.001}MiB")).search
    assert less is not None
    assert less.best.memory_mb is not None
    assert less.best.memory_mb < free.best.memory_mb


def test_a_dry_run_looks_at_where_the_output_would_go(model: Path, strategy: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists):
        export(ExportRequest(model=str(model), strategy=strategy, shape="3x0.5", out=tmp_path / "out", dry_run=True))


def test_a_graph_is_spelled_for_the_runtime_of_its_target(model: Path, strategy: Path, tmp_path: Path):
    """Measured and verified as it is: operators of ONNX alone."""
    pytest.importorskip("openvino")
    request = ExportRequest(model=str(model), strategy=strategy, target="openvino-cpu", shape="3x0.5", prompt_tokens=8)
    result = export(dataclasses.replace(request, formats=("onnx",), out=tmp_path / "out"))
    assert result.manifest is not None
    assert result.manifest.latency is not None
    assert result.manifest.latency.source == "measured"
    graph = onnx.load(str(tmp_path / "out" / "onnx" / "model.onnx"), load_external_data=False)
    assert {domain.domain for domain in graph.opset_import} == {""}


def test_a_shape_over_its_budget_is_refused(model: Path, strategy: Path, target: Path, tmp_path: Path):
    request = ExportRequest(
        model=str(model), strategy=strategy, target=str(target), shape="4x0.75", latency="30%", out=tmp_path / "out"
    )
    with pytest.raises(BudgetMissed) as caught:
        export(request)
    assert caught.value.what.startswith("The subnet 4x0.75 takes ")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """A LoRA of rank 2 on every linear weight."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    tuned.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def write_quality(request: ExportRequest, losses: dict[str, float], policy: str = "uniform") -> Path:
    """What `evaluate --grid` leaves in the adapter of `request`."""
    supernet = load_supernet(request.model, adapters=request.adapters, strategy=request.strategy)
    shapes = [ShapeQuality(shape=Shape.parse(n), num_params=1, prunable=1, loss=loss) for n, loss in losses.items()]
    inputs = {f"{item.role} {item.id}": item.sha256 for item in supernet.inputs}
    path = request.adapters[-1] / "quality.json"
    QualityFile(subject={"inputs": inputs, "policy": policy}, measured={}, shapes=tuple(shapes)).write(path)
    return path


LOSSES = {"4x1": 2.0, "4x0.5": 9.0, "3x1": 2.1, "3x0.5": 9.1, "2x1": 2.2, "2x0.5": 9.2}
"""With the adapter, layers cost next to nothing and width costs a lot: the opposite of the strategy's own figures."""


def test_what_was_measured_with_an_adapter_decides_its_search(
    model: Path, strategy: Path, target: Path, adapter: Path, tmp_path: Path
):
    request = ExportRequest(
        model=str(model),
        strategy=strategy,
        adapters=(adapter,),
        target=str(target),
        latency="75%",
        out=tmp_path / "out",
    )
    before = pipeline.search(request)
    path = write_quality(request, LOSSES)
    listener = Listener()
    result = export(request, progress=listener)
    assert before.plan.shape.depth == 4
    assert (result.plan.shape.width, result.plan.shape.depth < 4) == (1.0, True)
    assert listener.warnings == []
    assert (
        f"What a shape is worth comes from {path}: loss of 6 shapes with the adapter, 4x1 to 2x0.5." in listener.notes
    )
    manifest = read_manifest(tmp_path / "out")
    assert [item.role for item in manifest.inputs][:4] == ["model", "adapter", "strategy", "quality"]
    assert manifest.inputs[3].sha256 == sha256_file(path)
    assert manifest.quality == {"loss": LOSSES[str(result.plan.shape)], "loss_full": 2.0}
    words = ["--strategy", strategy, "--adapter", adapter, "--model", model]
    assert main([str(word) for word in ("verify", tmp_path / "out", *words)]) == 0


def test_where_an_adapter_says_what_shapes_there_are_smaller_ones_are_to_be_measured_with_it(
    model: Path, strategy: Path, target: Path, adapter: Path
):
    request = ExportRequest(model=str(model), strategy=strategy, adapters=(adapter,), target=str(target), latency="30%")
    write_quality(request, {"4x1": 2.0, "3x1": 2.1})
    with pytest.raises(NothingFits) as caught:
        pipeline.search(request)
    assert caught.value.next_step is not None
    assert caught.value.next_step.endswith(
        " ms or more, or measure smaller shapes, too, with 'amoeba evaluate --grid' and --depths or --widths."
    )


def test_a_quality_file_of_other_inputs_is_left_aside(
    model: Path, strategy: Path, target: Path, adapter: Path, tmp_path: Path
):
    request = ExportRequest(model=str(model), strategy=strategy, adapters=(adapter,), target=str(target), latency="75%")
    before = pipeline.search(request)
    old = load_supernet(str(model), strategy=strategy).inputs[1]
    path = write_quality(request, LOSSES)
    other = tmp_path / "other.safetensors"
    write_strategy(dataclasses.replace(read_strategy(strategy), provenance={"seed": "1"}), other)
    now = load_supernet(str(model), strategy=other).inputs[1]
    listener = Listener()
    result = pipeline.search(dataclasses.replace(request, strategy=other), progress=listener)
    assert result.plan.shape == before.plan.shape
    assert [item.role for item in result.supernet.inputs] == ["model", "adapter", "strategy"]
    assert listener.warnings == [
        f"{path} is not used: it was measured with the strategy strategy.safetensors ({old.sha256:.12}); here is the "
        f"strategy other.safetensors ({now.sha256:.12}). What a shape is worth comes from the strategy, without the "
        "adapter. Measure again with 'amoeba evaluate --grid'."
    ]
    write_quality(request, LOSSES, policy="adaptive")
    listener = Listener()
    assert pipeline.search(request, progress=listener).plan.shape == before.plan.shape
    assert "its shapes are adaptive, and uniform ones are asked for" in listener.warnings[0]


def test_an_interrupt_leaves_nothing(model: Path, strategy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "verify_artifact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(ExportRequest(model=str(model), strategy=strategy, shape="3x0.5", out=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["strategy.safetensors"]


def test_an_estimated_target_says_so(model: Path, strategy: Path, tmp_path: Path):
    out = tmp_path / "out"
    request = ExportRequest(
        model=str(model), strategy=strategy, target="jetson", latency="90%", formats=("safetensors",), out=out
    )
    export(request)
    latency = json.loads((out / "amoeba.json").read_text())["latency"]
    assert latency["source"] == "analytic"
    assert latency["measured_ms"] is None
    assert latency["predicted_ms"] <= latency["budget_ms"]
    assert latency["uncertainty"] > 0


def test_an_estimate_can_be_refused(model: Path, tmp_path: Path):
    request = ExportRequest(
        model=str(model), target="jetson", latency="5ms", require_measured=True, out=tmp_path / "out"
    )
    with pytest.raises(EstimateRefused) as caught:
        export(request)
    assert caught.value.exit_code == 6


def test_a_dry_run_writes_nothing(model: Path, strategy: Path, target: Path, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    request = ExportRequest(
        model=str(model),
        strategy=strategy,
        target=str(target),
        latency="70%",
        out=tmp_path / "out",
        dry_run=True,
    )
    result = export(request)
    assert result.manifest is None
    assert result.search is not None
    assert result.search.best.fits
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_output_is_kept(model: Path, strategy: Path, tmp_path: Path):
    request = ExportRequest(model=str(model), strategy=strategy, shape="3x0.5", out=tmp_path / "out")
    export(request)
    before = read_manifest(tmp_path / "out")
    with pytest.raises(OutputExists):
        export(request)
    assert read_manifest(tmp_path / "out") == before


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(Problems) as caught:
        export(ExportRequest(target="cqu", latency="banana", policy="unform", recipe="quik"))
    assert caught.value.exit_code == 2
    names = [type(problem).__name__ for problem in caught.value.problems]
    assert names == ["UnknownName", "UnknownName", "BadValue", "UnknownName"]
    assert "Did you mean 'cpu'?" in str(caught.value)


def test_nothing_says_how_small():
    with pytest.raises(AmoebaError) as caught:
        export(ExportRequest(target="cpu"))
    assert str(caught.value) == (
        "Nothing says how small the subnet should be.\n"
        "  next:  Give --latency (50ms, 75%), --throughput (30tok/s), --quality-loss (5%), --shape (24x0.75) or --plan "
        "(a file)."
    )
