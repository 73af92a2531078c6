"""A refit on its way through an export: cached, named in plan, manifest and inputs, replayed, verified."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from amoeba_export import ExportRequest, export
from amoeba_export.application.pipeline import resolve_settings
from amoeba_export.application.refit import heal as heal_alone
from amoeba_export.application.refit import refit as refit_alone
from amoeba_export.application.resolve import read_heal
from amoeba_export.application.ways import Replay
from amoeba_export.errors import (
    BadValue,
    NotFound,
    NothingIsCut,
    RefitDiffers,
    TooFewSamples,
    UnknownName,
    UsageError,
)
from amoeba_export.refit import HEAL_RECIPE, HealSettings, RefitRecipe
from tests.listener import Listener
from tests.model.models import save_tokenizer
from tests.tiny import save_tiny


@pytest.fixture
def tiny_recipe(monkeypatch: pytest.MonkeyPatch, recipe: RefitRecipe) -> None:
    """All refit recipes are a small one on words that the tiny tokenizer knows."""
    set_recipe(monkeypatch, recipe)


def set_recipe(monkeypatch: pytest.MonkeyPatch, recipe: RefitRecipe) -> None:
    for module in ("request", "resolve"):
        monkeypatch.setattr(f"amoeba_export.application.{module}.load_refit_recipe", lambda name: recipe)


@pytest.fixture
def request_(
    tmp_path: Path, tiny_recipe: None, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> ExportRequest:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model")
    save_tokenizer(model)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[data]\nfile = "{texts[0]}"\nwindow = 32\nsamples = 4\nheldout = 2\n[depth]\nmax_removed = 1\n',
        encoding="utf-8",
    )
    return ExportRequest(
        model=str(model),
        shape="3x0.6",
        recipe=str(recipe),
        refit="full",
        out=tmp_path / "out",
        formats=("safetensors",),
    )


def plan_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return found


def weights(folder: Path) -> bytes:
    return (folder / "safetensors" / "model.safetensors").read_bytes()


def test_an_export_is_refitted_and_says_so_everywhere(request_: ExportRequest, tmp_path: Path) -> None:
    listener = Listener()
    result = export(request_, progress=listener)
    manifest = json.loads((tmp_path / "out" / "amoeba.json").read_text(encoding="utf-8"))
    named = plan_of(tmp_path / "out")["refit_id"]
    assert manifest["refit"]["sha256"] == named == result.plan.refit_id
    assert manifest["refit"]["kind"] == "refit" and set(manifest["refit"]["losses"]) == {"mix", "another"}
    assert [item["sha256"] for item in manifest["inputs"] if item["role"] == "refit"] == [named]
    assert any(note.startswith(f"Refitted {result.plan.shape}: loss on") for note in listener.notes)
    bare = export(dataclasses.replace(request_, refit="off", out=tmp_path / "bare"))
    assert bare.plan.refit_id is None and "refit_id" not in plan_of(tmp_path / "bare")
    assert "refit" not in json.loads((tmp_path / "bare" / "amoeba.json").read_text(encoding="utf-8"))
    assert weights(tmp_path / "bare") != weights(tmp_path / "out")


def test_the_second_time_it_comes_from_the_cache(request_: ExportRequest, tmp_path: Path) -> None:
    export(request_)
    listener = Listener()
    export(dataclasses.replace(request_, out=tmp_path / "again"), progress=listener)
    assert not any(note.startswith("Refitting") for note in listener.notes)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_a_plan_that_names_a_refit_is_exported_with_it(request_: ExportRequest, tmp_path: Path) -> None:
    result = export(request_)
    given = dataclasses.replace(request_, shape=None, plan=tmp_path / "out", out=tmp_path / "again")
    export(given)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    replayed = dataclasses.replace(request_, out=tmp_path / "replayed")
    export(replayed, replay=Replay(plan=result.plan))
    assert weights(tmp_path / "replayed") == weights(tmp_path / "out")
    export(dataclasses.replace(given, refit="off", out=tmp_path / "bare"))
    assert weights(tmp_path / "bare") != weights(tmp_path / "out")


def test_a_plan_whose_refit_is_gone_has_it_made_again_and_compared(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = export(request_)
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "empty"))
    replayed = dataclasses.replace(request_, out=tmp_path / "replayed")
    export(replayed, replay=Replay(plan=result.plan))
    assert weights(tmp_path / "replayed") == weights(tmp_path / "out")
    other = dataclasses.replace(result.plan, refit_id="0" * 64)
    with pytest.raises(RefitDiffers, match="another fit on this machine"):
        export(dataclasses.replace(replayed, out=tmp_path / "other"), replay=Replay(plan=other))


def test_healing_starts_at_the_refit_and_replaces_it(request_: ExportRequest, tmp_path: Path) -> None:
    result = export(dataclasses.replace(request_, heal="2ktok"))
    manifest = result.manifest
    assert manifest is not None and manifest.refit is not None and manifest.refit.kind == "heal"
    assert len([item for item in manifest.inputs if item.role == "refit"]) == 1
    held = result.supernet.refits[result.plan.refit_id or ""]
    assert held.settings["start"] in result.supernet.refits
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "safetensors")
    embedding = dense.model.embed_tokens.weight.detach()
    torch.testing.assert_close(embedding, held.tensors.read("model.embed_tokens.weight"))


def test_a_recipe_says_how_long_a_cut_is_healed(
    request_: ExportRequest, tmp_path: Path, recipe: RefitRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless another length is asked for, or the model is large. A plan that names its refit is complete."""
    set_recipe(monkeypatch, recipe.model_copy(update={"heal_tokens": 512}))
    made = export(request_)
    held = made.supernet.refits[made.plan.refit_id or ""]
    assert held.kind == "heal" and held.settings["trained_tokens"] == 512
    given = dataclasses.replace(request_, shape=None, plan=tmp_path / "out", out=tmp_path / "given")
    assert export(given).plan.refit_id == made.plan.refit_id
    unhealed = export(dataclasses.replace(request_, heal="off", out=tmp_path / "unhealed"))
    assert unhealed.supernet.refits[unhealed.plan.refit_id or ""].kind == "refit"
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "empty"))
    for number, plan in enumerate((made.plan, unhealed.plan)):  # made again, each to the same bytes
        again = dataclasses.replace(request_, out=tmp_path / f"again-{number}")
        assert export(again, replay=Replay(plan=plan)).plan.refit_id == plan.refit_id
    monkeypatch.setattr("amoeba_export.application.refits.HEALED_UP_TO", 1000)
    listener = Listener()
    large = export(dataclasses.replace(request_, out=tmp_path / "large"), progress=listener)
    assert large.plan.refit_id == unhealed.plan.refit_id
    assert any(note.startswith("The cut is not healed, because the model has") for note in listener.notes)


def test_a_refit_that_makes_a_cut_worse_is_not_shipped(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut keeps its weights, with a warning. A heal starts from these, and is made again to the same bytes."""
    bare = export(dataclasses.replace(request_, refit="off", out=tmp_path / "bare"))
    monkeypatch.setattr("amoeba_export.application.refits.is_worse", lambda held: held.kind == "refit")
    listener = Listener()
    made = export(request_, progress=listener)
    assert any("The refit raises the held-out loss" in text for text in listener.notes)
    assert made.plan == bare.plan and weights(tmp_path / "out") == weights(tmp_path / "bare")
    healed = export(dataclasses.replace(request_, heal="2ktok", out=tmp_path / "healed"))
    held = healed.supernet.refits[healed.plan.refit_id or ""]
    assert held.kind == "heal" and held.settings["start"] is None
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "empty"))
    again = dataclasses.replace(request_, heal="2ktok", out=tmp_path / "again")
    assert export(again, replay=Replay(plan=healed.plan)).plan.refit_id == healed.plan.refit_id
    assert weights(tmp_path / "again") == weights(tmp_path / "healed")
    file = tmp_path / "alone.safetensors"
    alone = heal_alone(request_.model, plan=tmp_path / "bare", out=file, heal="2ktok", recipe=request_.recipe)
    assert alone.identity == healed.plan.refit_id, "the stage of its own starts where an export does"


def test_a_heal_that_makes_a_cut_worse_is_not_shipped(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cut keeps its refit, with a warning. As a call of its own, it is written and said."""
    kept = export(dataclasses.replace(request_, out=tmp_path / "kept"))
    monkeypatch.setattr("amoeba_export.application.refits.is_worse", lambda held: held.kind == "heal")
    listener = Listener()
    made = export(dataclasses.replace(request_, heal="2ktok"), progress=listener)
    assert any(note.startswith("The heal raises the held-out loss") for note in listener.notes)
    assert made.plan == kept.plan and weights(tmp_path / "out") == weights(tmp_path / "kept")
    assert made.manifest is not None and made.manifest.refit is not None and made.manifest.refit.kind == "refit"
    listener, file = Listener(), tmp_path / "healed.safetensors"
    held = heal_alone(
        request_.model, plan=tmp_path / "kept", out=file, heal="2ktok", recipe=request_.recipe, progress=listener
    )
    assert held.kind == "heal" and file.is_file()
    assert any("The cut is better without it." in note for note in listener.notes)


def test_the_commands_say_how_their_file_is_exported(request_: ExportRequest, tmp_path: Path, amoeba: Any) -> None:
    export(dataclasses.replace(request_, refit="off"))
    plan, fitted, healed = (
        tmp_path / "out" / "plan.json",
        tmp_path / "fitted.safetensors",
        tmp_path / "healed.safetensors",
    )
    given = (request_.model, "--plan", plan, "--recipe", request_.recipe)
    for words, file in ((("refit",), fitted), (("heal", "--refit", fitted, "--heal", "1ktok"), healed)):
        run = amoeba(*words, *given, "--out", file)
        assert run.code == 0, run.err
        following = " ".join(run.out[run.out.index("next: ") + 6 :].split())
        assert following == " ".join(map(str, ("amoeba export", *given, "--refit", file)))


def test_verify_finds_the_refit_and_misses_it(request_: ExportRequest, tmp_path: Path, amoeba: Any) -> None:
    result = export(request_)
    words = ("verify", tmp_path / "out", "--model", request_.model)
    assert amoeba(*words).code == 0
    root = Path(os.environ["AMOEBA_CACHE"])
    (file,) = (path for path in root.rglob("refit.safetensors"))
    content = file.read_bytes()
    file.unlink()
    missing = amoeba(*words)
    assert missing.code == 3 and "--refit" in missing.err
    (tmp_path / "refit.safetensors").write_bytes(content)
    assert amoeba(*words, "--refit", tmp_path / "refit.safetensors").code == 0
    assert result.plan.refit_id is not None


def test_a_model_that_cannot_be_refitted_is_exported_as_it_is_cut(
    request_: ExportRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, with a warning; not where a refit was asked for."""
    monkeypatch.setattr("amoeba_export.application.resolve.DEFAULT_REFIT", "full")
    result = export(dataclasses.replace(request_, refit="off"))
    given = tmp_path / "out" / "plan.json"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(request_.model) / name).unlink()
    listener = Listener()
    asked = dataclasses.replace(request_, shape=None, plan=given, refit=None, out=tmp_path / "again")
    assert export(asked, progress=listener).plan == result.plan
    assert any(warning.startswith("The weights are not refitted") for warning in listener.notes)


def test_a_cut_whose_texts_are_too_short_to_heal_is_shipped_as_it_is_refitted(
    request_: ExportRequest, tmp_path: Path, recipe: RefitRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, with a warning; not where a heal was asked for."""
    recipe = recipe.model_copy(update={"heal_tokens": 1024})
    set_recipe(monkeypatch, recipe)
    too_long = recipe.model_copy(update={"tokens": 10**9})
    monkeypatch.setattr(
        "amoeba_export.application.request.load_refit_recipe", lambda name: too_long if name == HEAL_RECIPE else recipe
    )
    listener = Listener()
    result = export(dataclasses.replace(request_, heal=None), progress=listener)
    assert result.plan.refit_id is not None
    assert any(note.startswith("The cut is refitted and not healed: The calibration data") for note in listener.notes)
    with pytest.raises(TooFewSamples):
        export(dataclasses.replace(request_, heal="1ktok", out=tmp_path / "asked"))


def test_a_plan_that_names_a_refit_is_healed_from_there(request_: ExportRequest, tmp_path: Path) -> None:
    started = export(request_).plan.refit_id
    given = dataclasses.replace(request_, shape=None, plan=tmp_path / "out", out=tmp_path / "healed", heal="2ktok")
    result = export(given)
    assert result.supernet.refits[result.plan.refit_id or ""].settings["start"] == started


def test_nothing_is_refitted_where_nothing_is_cut(request_: ExportRequest) -> None:
    listener = Listener()
    asked = dataclasses.replace(request_, shape="4x1", heal="2ktok")
    assert export(asked, progress=listener).plan.refit_id is None
    assert "Nothing is cut, so nothing is healed." in listener.notes


def test_what_may_be_asked_for() -> None:
    found = {text: read_heal(text) or HealSettings() for text in ("20m", "1.5h", "2Mtok", "500 ktok")}
    assert (found["20m"].seconds, found["1.5h"].seconds) == (1200, 5400)
    assert (found["2Mtok"].tokens, found["500 ktok"].tokens) == (2_000_000, 500_000)
    assert read_heal("off") is None
    for wrong in ("20", "0m", "fast", "2 M", "-1m", "9" * 400 + "tok"):
        with pytest.raises(BadValue):
            read_heal(wrong)
    with pytest.raises(UnknownName):
        export(ExportRequest(shape="3x0.6", refit="fats"))


def test_a_text_that_nothing_is_fitted_on_is_said(request_: ExportRequest, texts: tuple[Path, Path]) -> None:
    said = (
        "--calibration-data is not used: it is for a refit, for integers that are chosen with data, and for a "
        "--vocab-keep that is a number."
    )
    bare = dataclasses.replace(request_, refit="off", calibration_data=(texts[0],), dry_run=True)
    onnx = dataclasses.replace(bare, formats=("onnx",))
    for request, is_said in (
        (bare, True),
        (dataclasses.replace(bare, refit="fast"), False),
        (dataclasses.replace(onnx, dtype="int4"), False),
        (dataclasses.replace(onnx, dtype="int4", rounding="nearest"), True),
        (dataclasses.replace(onnx, dtype="int8"), True),
        (dataclasses.replace(onnx, vocab_keep=str(120)), False),
    ):
        listener = Listener()
        settings = resolve_settings(request, listener)
        assert (said in listener.notes) == is_said, settings.summary


def test_a_text_that_is_not_there_is_said_before_the_work(request_: ExportRequest, tmp_path: Path) -> None:
    """Whether a refit was asked for or not: without its texts, a cut would be shipped as it was cut."""
    for refit in (None, "off", "fast"):
        with pytest.raises(NotFound) as caught:
            export(dataclasses.replace(request_, refit=refit, calibration_data=(tmp_path / "no.txt",), dry_run=True))
        assert caught.value.what == f"A text of --calibration-data was not found: {tmp_path / 'no.txt'}"


def test_a_refit_made_by_itself_is_what_export_makes(request_: ExportRequest, tmp_path: Path) -> None:
    result = export(request_)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dataclasses.replace(result.plan, refit_id=None).to_json()), encoding="utf-8")
    made = {"model": request_.model, "plan": plan, "recipe": request_.recipe}
    held = refit_alone(**made, out=tmp_path / "refit.safetensors")
    assert held.identity == result.plan.refit_id
    given = {**made, "refit": str(tmp_path / "refit.safetensors")}
    export(ExportRequest(**given, out=tmp_path / "given", formats=("safetensors",)))
    assert weights(tmp_path / "given") == weights(tmp_path / "out")
    healed = heal_alone(**given, heal="2ktok", out=tmp_path / "healed.safetensors")
    assert healed.kind == "heal" and healed.settings["start"] == held.identity
    export(
        ExportRequest(
            **made, refit=str(tmp_path / "healed.safetensors"), out=tmp_path / "healed", formats=("safetensors",)
        )
    )
    assert plan_of(tmp_path / "healed")["refit_id"] == healed.identity


def test_a_refit_of_nothing_is_refused(request_: ExportRequest, tmp_path: Path) -> None:
    bare = dataclasses.replace(request_, shape="4x1", refit="off", out=tmp_path / "whole")
    export(bare)
    with pytest.raises(NothingIsCut, match="keeps everything"):
        refit_alone(request_.model, plan=tmp_path / "whole", recipe=request_.recipe, out=tmp_path / "f.safetensors")


def test_a_refit_file_needs_its_cut(request_: ExportRequest, tmp_path: Path) -> None:
    searched = dataclasses.replace(request_, shape=None, target="cpu", latency="75%", refit="f.safetensors")
    with pytest.raises(UsageError, match="has the weights of one cut"):
        export(searched)
