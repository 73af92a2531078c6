from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.errors import DamagedFile, NonFiniteWeights, NotFound, UnsupportedError, WeightsMismatch
from amoeba_export.load import load_supernet
from tests.tiny import FAMILIES, tiny_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A tied tiny llama that a test may damage."""
    return Path(shutil.copytree(tiny_dirs["llama"], tmp_path / "model"))


def sharded(folder: Path, num_shards: int = 3) -> Path:
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(sorted(weights.items())[shard::num_shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change(folder: Path, **weights: torch.Tensor | None) -> None:
    """Replace, add or (None) drop weights of a single file. `__` in a keyword stands for a dot."""
    kept = load_file(folder / SINGLE) | {name.replace("__", "."): weight for name, weight in weights.items()}
    save_file({name: weight for name, weight in kept.items() if weight is not None}, folder / SINGLE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_weight_is_read_as_transformers_reads_it(
    tiny_dirs: dict[str, Path], tmp_path: Path, family: str, num_shards: int
):
    folder = Path(shutil.copytree(tiny_dirs[family], tmp_path / "model"))
    if num_shards > 1:
        sharded(folder, num_shards)
    supernet = load_supernet(str(folder))
    theirs = tiny_model(family).state_dict()
    if supernet.architecture.tied_embeddings:
        del theirs["lm_head.weight"]
    assert set(supernet.tensors.names()) == set(theirs)
    for name, weight in theirs.items():
        assert supernet.tensors.shape(name) == tuple(weight.shape)
        assert supernet.tensors.dtype(name) == torch.float32
        assert torch.equal(supernet.tensors.read(name), weight), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_precision(folder: Path, dtype: torch.dtype):
    weights = {name: weight.to(dtype) for name, weight in load_file(folder / SINGLE).items()}
    save_file(weights, folder / SINGLE)
    tensors = load_supernet(str(folder)).tensors
    for name, weight in weights.items():
        assert tensors.dtype(name) == dtype
        assert torch.equal(tensors.read(name), weight)


def test_loading_reads_no_weight(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A NaN in the file is found when its weight is read, and not before."""
    weight = load_file(folder / SINGLE)["model.norm.weight"]
    weight[3] = float("nan")
    change(folder, model__norm__weight=weight)
    tensors = load_supernet(str(folder)).tensors
    tensors.read("model.embed_tokens.weight")
    with pytest.raises(NonFiniteWeights) as caught:
        tensors.read("model.norm.weight")
    assert str(caught.value) == (
        f"The weight model.norm.weight is not finite: NaN or infinity in {folder / SINGLE}.\n"
        "  next:  Get the file again, or train it again."
    )


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_item_is_found_wherever_it_is(folder: Path, dtype: torch.dtype, value: float):
    for position in (0, 1, 64, 94, 95):
        norm = torch.ones(96, dtype=dtype)
        norm[position] = value
        change(folder, model__norm__weight=norm)
        with pytest.raises(NonFiniteWeights):
            load_supernet(str(folder)).tensors.read("model.norm.weight")


def test_writing_into_a_weight_does_not_reach_the_file(folder: Path):
    before = (folder / SINGLE).read_bytes()
    tensors = load_supernet(str(folder)).tensors
    tensors.read("model.norm.weight").zero_()
    assert (folder / SINGLE).read_bytes() == before
    assert tensors.read("model.norm.weight").abs().sum() > 0


def test_a_file_that_shrinks_after_it_was_opened(folder: Path):
    tensors = load_supernet(str(folder)).tensors
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:2000])
    with pytest.raises(DamagedFile, match=r"can no longer be read"):
        tensors.read("model.norm.weight")


# --- files that are not sound -----------------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def too_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_json(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:12] = b"oops"
    path.write_bytes(bytes(content))


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def overlapping(path: Path) -> None:
    header, body = header_of(path)
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"][0] = header[first]["data_offsets"][0]
    with_header(path, header, body)


def wrong_size(path: Path) -> None:
    header, body = header_of(path)
    header["model.norm.weight"]["shape"] = [95]
    with_header(path, header, body)


def negative_offset(path: Path) -> None:
    header, body = header_of(path)
    header["model.norm.weight"]["data_offsets"] = [-384, 0]
    with_header(path, header, body)


def a_picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 64)


@pytest.mark.parametrize(
    "damage",
    [truncated, too_long, empty, not_json, endless_header, overlapping, wrong_size, negative_offset, a_picture],
)
def test_a_damaged_file_is_named(folder: Path, damage: Any):
    damage(folder / SINGLE)
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(folder))
    assert caught.value.where == str(folder / SINGLE)
    assert caught.value.exit_code == 3


def test_a_truncated_shard_is_named(folder: Path):
    sharded(folder)
    truncated(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(folder))
    assert caught.value.where == str(folder / "model-00002-of-00003.safetensors")


def test_a_missing_shard_is_named(folder: Path):
    sharded(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(NotFound) as caught:
        load_supernet(str(folder))
    assert str(caught.value) == (
        f"A shard of the checkpoint was not found: {folder / 'model-00002-of-00003.safetensors'}\n"
        "  next:  Get the missing file and put it there."
    )


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "it is not JSON ("),
        ("[]", "it is not a JSON object"),
        ("{}", "its weight_map is not a table"),
        ('{"weight_map": {}}', "its weight_map is not a table"),
        ('{"weight_map": {"w": "../secret.safetensors"}}', "it names a shard outside its folder"),
    ],
)
def test_an_index_that_is_none(folder: Path, index: str, reason: str):
    sharded(folder)
    (folder / INDEX).write_text(index)
    with pytest.raises(DamagedFile) as caught:
        load_supernet(str(folder))
    assert reason in caught.value.what


def test_an_index_that_promises_a_weight_in_the_wrong_shard(folder: Path):
    sharded(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = next(
        shard for shard in index["weight_map"].values() if shard != index["weight_map"]["model.norm.weight"]
    )
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(DamagedFile, match=r"it promises model\.norm\.weight in .*, which does not have it"):
        load_supernet(str(folder))


@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_a_header_of_any_length(folder: Path, padding: int):
    """The format asks for no alignment, and writers other than safetensors' own give none."""
    header, body = header_of(folder / SINGLE)
    expected = load_file(folder / SINGLE)["model.norm.weight"].clone()  # load_file may map the file
    header["__metadata__"] = {"padding": "x" * padding}
    with_header(folder / SINGLE, header, body)
    assert torch.equal(load_supernet(str(folder)).tensors.read("model.norm.weight"), expected)


# --- weights that do not fit the config -------------------------------------------------------------------------------


def test_missing_left_over_and_reshaped_weights_are_named_at_once(folder: Path):
    change(
        folder,
        model__norm__weight=None,
        model__layers__0__mlp__down_proj__weight=torch.ones(96, 95),
        model__layers__9__input_layernorm__weight=torch.ones(96),
    )
    with pytest.raises(WeightsMismatch) as caught:
        load_supernet(str(folder))
    assert str(caught.value) == (
        "The weights do not fit the model's config: model.norm.weight is missing; "
        "model.layers.9.input_layernorm.weight is left over; "
        "model.layers.0.mlp.down_proj.weight has shape [96, 95] and should have [96, 96].\n"
        f"  where: {folder}\n"
        "  next:  Give config.json and weights that belong together."
    )


def test_a_long_list_of_misfits_is_cut(folder: Path):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 6}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsMismatch, match="; and 12 more"):
        load_supernet(str(folder))


def test_saved_rotary_buffers_are_left_alone(folder: Path):
    change(folder, model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(16))
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" not in load_supernet(str(folder)).tensors.names()


def test_a_tied_head_may_be_there_if_it_is_the_embedding(folder: Path):
    embedding = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding.clone())
    assert "lm_head.weight" not in load_supernet(str(folder)).tensors.names()
    change(folder, lm_head__weight=embedding + 1)
    with pytest.raises(WeightsMismatch, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight and differs"):
        load_supernet(str(folder))


def test_a_tied_head_may_stand_for_the_embedding(folder: Path):
    embedding = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding.clone(), model__embed_tokens__weight=None)
    assert torch.equal(load_supernet(str(folder)).tensors.read("model.embed_tokens.weight"), embedding)


def test_integer_weights_are_refused(folder: Path):
    change(folder, model__norm__weight=torch.ones(96, dtype=torch.int8))
    with pytest.raises(UnsupportedError) as caught:
        load_supernet(str(folder))
    assert str(caught.value) == (
        "The weight model.norm.weight has the type I8; only floating point weights can be cut.\n"
        f"  where: {folder / SINGLE}\n"
        "  next:  Give a checkpoint in fp32, fp16 or bf16."
    )


def test_a_pickled_checkpoint_gets_advice(folder: Path):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(NotFound) as caught:
        load_supernet(str(folder))
    assert str(caught.value) == (
        f"A safetensors checkpoint was not found: {folder / SINGLE}\n"
        "  next:  Its weights are pickled (.bin): save the model once with transformers' save_pretrained."
    )
