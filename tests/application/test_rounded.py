"""Integers chosen with data on their way through an export: cached, named as an input, verified by their own file."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from amoeba_export import ExportRequest, export
from amoeba_export.application import rounded
from amoeba_export.application.resolve import resolve
from amoeba_export.application.rounded import ROUNDED_NAME
from amoeba_export.application.session import open_session
from amoeba_export.application.verify import verify
from amoeba_export.errors import NotFound, NumbersDiffer, UnknownName
from amoeba_export.formats.write import write_formats
from amoeba_export.load.rounded import read_rounded
from amoeba_export.materialize import materialize_subnet
from amoeba_export.refit import RefitRecipe
from amoeba_export.refit.gptq import Grid, Rounded
from amoeba_export.refit.rounding import RoundedLayer
from amoeba_export.verify import verify_artifact
from amoeba_export.verify.expected import ExpectedWeights
from amoeba_export.verify.stored import STORED
from tests.formats.bpe import save_bpe
from tests.model.models import save_tokenizer
from tests.tiny import save_tiny


@pytest.fixture
def request_(
    tmp_path: Path, recipe: RefitRecipe, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> ExportRequest:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("amoeba_export.application.request.load_refit_recipe", lambda name: recipe)
    monkeypatch.setattr(rounded, "TOKENS", 1024)
    model = save_tiny(tmp_path / "model")
    save_tokenizer(model)
    return ExportRequest(model=str(model), shape="4x1", formats=("onnx",), dtype="int4", out=tmp_path / "out")


def rounding_file(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache").glob(f"rounded/*/{ROUNDED_NAME}")
    return found


@pytest.mark.parametrize(
    ("container", "dtype"),
    [
        ("onnx", "int4"),
        ("onnx", "int4-mixed"),
        ("gguf", "int4"),
        ("gguf", "q4_k_m"),
        ("safetensors", "w4a16"),
        ("safetensors", "w4a16-asym"),
    ],
)
def test_an_artifact_has_the_integers_of_its_rounding(
    request_: ExportRequest, tmp_path: Path, container: str, dtype: str
) -> None:
    request_ = dataclasses.replace(request_, formats=(container,), dtype=dtype, rounding="data")
    if container == "gguf":
        save_bpe(Path(request_.model))
    result = export(request_)
    assert result.manifest is not None
    (named,) = [item for item in result.manifest.inputs if item.role == "rounding"]
    held = read_rounded(rounding_file(tmp_path))
    assert (held.identity, held.format, held.dtype) == (named.sha256, container, dtype)
    provenance = (tmp_path / "out" / "provenance.json").read_text(encoding="utf-8")
    assert named.sha256 in provenance
    shapes = {name: held.tensors.shape(name) for name in held.tensors.names()}
    stored = STORED[container](tmp_path / "out" / container, ExpectedWeights(result.supernet, result.plan).wanted)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    # The head, which is the embedding here, has 8 bits or is no integer elsewhere.
    has_head = (container, dtype) == ("onnx", "int4")
    assert len(matrices) == 4 * 7 + has_head
    assert ("model.embed_tokens.weight" in matrices) == has_head
    for name in matrices:
        found, wanted = stored.read(name), held.tensors.read(name)
        steps = found.steps if found.searched is None else found.searched.steps
        assert steps is not None
        near = 0.04 if dtype == "int4-mixed" else 1e-5
        assert (found.values - wanted).abs().max() <= near * steps.abs().max()
    assert verify(tmp_path / "out", model=str(tmp_path / "model")).verification is not None


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_some_tokens_has_the_integers_of_the_whole_one(
    request_: ExportRequest, tmp_path: Path, tied: bool
) -> None:
    model = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    save_tokenizer(model)
    (tmp_path / "ids.json").write_text(json.dumps(list(range(60))))
    result = export(dataclasses.replace(request_, vocab_keep=str(tmp_path / "ids.json")))
    held, kept = read_rounded(rounding_file(tmp_path)), list(result.plan.head_tokens or ())
    assert 60 <= len(kept) < 128
    stored = STORED["onnx"](tmp_path / "out" / "onnx", ExpectedWeights(result.supernet, result.plan).wanted)
    whole = held.tensors.read("model.embed_tokens.weight" if tied else "lm_head.weight")
    torch.testing.assert_close(stored.read("lm_head.weight").values, whole[kept], atol=1e-6, rtol=1e-5)
    assert ("model.embed_tokens.weight" in held.tensors.names()) == tied


def test_the_same_request_gives_the_same_bytes_and_another_way_of_rounding_others(
    request_: ExportRequest, tmp_path: Path
) -> None:
    export(request_)
    shutil.rmtree(tmp_path / "cache")
    export(dataclasses.replace(request_, out=tmp_path / "again"))
    nearest = export(dataclasses.replace(request_, out=tmp_path / "nearest", rounding="nearest"))
    first, again, other = (
        (tmp_path / name / "onnx" / "model.onnx.data").read_bytes() for name in ("out", "again", "nearest")
    )
    assert first == again != other
    assert nearest.manifest is not None
    assert not [item for item in nearest.manifest.inputs if item.role == "rounding"]


def test_verification_needs_the_file_and_believes_no_other(request_: ExportRequest, tmp_path: Path) -> None:
    export(request_)
    kept = tmp_path / "kept.safetensors"
    shutil.copy(rounding_file(tmp_path), kept)
    shutil.rmtree(tmp_path / "cache" / "rounded")
    with pytest.raises(NotFound, match="rounded weights"):
        verify(tmp_path / "out", model=str(tmp_path / "model"))
    assert verify(tmp_path / "out", model=str(tmp_path / "model"), rounding=kept).verification is not None
    export(dataclasses.replace(request_, out=tmp_path / "other", seed=1))
    other = next(
        item
        for item in json.loads((tmp_path / "other" / "amoeba.json").read_text())["inputs"]
        if item["role"] == "rounding"
    )
    assert other["sha256"] != read_rounded(kept).identity
    with pytest.raises(NotFound, match="rounded weights"):
        verify(tmp_path / "other", model=str(tmp_path / "model"), rounding=kept)


def test_other_integers_are_found(request_: ExportRequest, tmp_path: Path) -> None:
    """Rounded to nearest is as good as a stranger's: it is not what the file says."""
    result = export(dataclasses.replace(request_, rounding="nearest"))
    session = dataclasses.replace(request_, out=tmp_path / "data")
    export(session)
    held = read_rounded(rounding_file(tmp_path))
    verify_artifact(tmp_path / "data", result.supernet, result.plan, rounded=held)
    for folder, expected in (("out", held), ("data", None)):
        with pytest.raises(NumbersDiffer):
            verify_artifact(tmp_path / folder, result.supernet, result.plan, rounded=expected)


def test_a_model_without_a_tokenizer_is_rounded_to_nearest(request_: ExportRequest, tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare")
    result = export(dataclasses.replace(request_, model=str(bare)))
    assert result.manifest is not None
    assert not [item for item in result.manifest.inputs if item.role == "rounding"]


@pytest.mark.parametrize("wrong", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_integers_that_do_not_stand_for_the_model_are_found(
    request_: ExportRequest, tmp_path: Path, wrong: str
) -> None:
    """Whatever chose them: file and rounding agree here, and are both wrong."""
    session = open_session(resolve(request_))
    plan = session.supernet.full_plan()
    held = rounded.with_rounding(session, plan).rounded
    assert held is not None
    tensors = held.tensors

    class OneIsZero:
        names, shape, dtype, packed = tensors.names, tensors.shape, tensors.dtype, tensors.packed

        def read(self, name: str) -> torch.Tensor:
            return tensors.read(name) * (name != wrong)

    subnet = materialize_subnet(session.supernet, plan)
    for name, source in (("right", tensors), ("wrong", OneIsZero())):
        folder = tmp_path / name
        folder.mkdir()
        write_formats(subnet, folder, {"onnx": "int4"}, options={"onnx": {"rounded": source}})
        used = dataclasses.replace(held, tensors=source)
        if name == "right":
            verify_artifact(folder, session.supernet, plan, rounded=used)
        else:
            with pytest.raises(NumbersDiffer, match=f"{wrong} has integers that do not stand for the model's"):
                verify_artifact(folder, session.supernet, plan, rounded=used)


def test_matrices_that_have_a_grid_need_no_data(request_: ExportRequest, tmp_path: Path) -> None:
    """What an artifact has was rounded once: exported again from its own values, nothing is left to choose."""
    session = open_session(resolve(request_))
    plan = session.supernet.full_plan()
    held = rounded.with_rounding(session, plan).rounded
    assert held is not None
    tensors = session.supernet.tensors

    class OnGrid:
        def names(self) -> object:
            return tensors.names()

        def shape(self, name: str) -> tuple[int, ...]:
            return tensors.shape(name)

        def dtype(self, name: str) -> torch.dtype:
            return torch.float32

        def read(self, name: str) -> torch.Tensor:
            return held.tensors.read(name) if name in held.tensors.names() else tensors.read(name)

    again = dataclasses.replace(session.supernet, tensors=OnGrid(), identity="ab" * 32)
    plan = dataclasses.replace(plan, model_id="ab" * 32)
    assert rounded.with_rounding(session.with_supernet(again), plan).rounded is None


def test_only_known_ways(request_: ExportRequest) -> None:
    with pytest.raises(UnknownName, match="rounding"):
        export(dataclasses.replace(request_, rounding="gptq"))


def test_mixtures_of_llama_cpp_are_rounded_with_data_only_if_asked(request_: ExportRequest) -> None:
    request_ = dataclasses.replace(request_, formats=("gguf",), dtype="q4_k_m")
    save_bpe(Path(request_.model))
    for rounding, expected in ((None, False), ("nearest", False), ("data", True)):
        session = open_session(resolve(dataclasses.replace(request_, rounding=rounding)))
        assert rounded.can_use_data(session) is expected


def test_a_file_does_not_depend_on_the_order_in_which_matrices_come(tmp_path: Path) -> None:
    """It is known by its bytes, and names of modules come in the order of a set."""
    grid = Grid(block_size=2, has_offsets=False, step_dtype="fp32")
    codes, blocks = torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 2)
    matrices = {name: Rounded(codes_OC=codes, steps_OG=blocks, offsets_OG=blocks, grid=grid) for name in ("a", "b")}
    others = {name: torch.ones(3) for name in ("c", "d")}
    specs: list[list[str]] = []
    for turned in (False, True):
        folder = tmp_path / str(len(specs))
        folder.mkdir()
        order = reversed if turned else list
        layer = RoundedLayer(matrices=dict(order(matrices.items())), others=dict(order(others.items())))
        specs.append([spec.name for spec in rounded._spread(iter([layer]), folder)[0]])
    assert specs[0] == specs[1]
    assert [name for name in specs[0] if "." not in name] == ["c", "d"]
