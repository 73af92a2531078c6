"""A folder whose files are links to somewhere else would have that published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.errors import LinkOutside
from amoeba_export.load import load_supernet
from tests.conftest import Run
from tests.trust.conftest import Place

NAMES = (
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "generation_config.json",
    "config.json",
    "model.safetensors",
    "additional_chat_templates/tool.jinja",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_model_is_refused(
    amoeba: Callable[..., Run], place: Place, tmp_path: Path, name: str
) -> None:
    """Whatever it leads to: here to the very content that was there, so that nothing else is wrong."""
    path, private = place.model / name, tmp_path / "private" / Path(name).name
    private.parent.mkdir()
    path.parent.mkdir(exist_ok=True)
    if path.is_file():
        path.rename(private)
    else:
        private.write_text("a secret")
    path.symlink_to(private)
    out = tmp_path / "out"
    run = amoeba("export", place.model, "--shape", "4x1", "--format", "safetensors", "--out", out)
    assert run.code == 3
    assert f"This folder has a link to a file outside: {name} is {private}." in run.err
    assert not out.exists()


def test_a_folder_of_templates_that_is_a_link_is_refused(place: Place, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.txt").write_text("a secret")
    (place.model / "additional_chat_templates").symlink_to(tmp_path / "private")
    with pytest.raises(LinkOutside, match=r"additional_chat_templates/secret\.txt is "):
        load_supernet(str(place.model))


def test_links_inside_and_links_to_the_folder_are_taken(place: Place, tmp_path: Path) -> None:
    (place.model / "files").mkdir()
    (place.model / "model.safetensors").rename(place.model / "files" / "weights")
    (place.model / "model.safetensors").symlink_to("files/weights")
    (place.model / "broken").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(place.model)
    assert load_supernet(str(tmp_path / "link")).architecture.num_layers == 4


def _cached(model: Path, cache: Path) -> Path:
    """The model as the hub's cache holds it."""
    repository = cache / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{i:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_links_to_its_own_blobs_and_to_no_others(place: Place, tmp_path: Path) -> None:
    snapshot = _cached(place.model, tmp_path / "hub")
    assert load_supernet(str(snapshot)).architecture.num_layers == 4
    other = tmp_path / "hub" / "models--somebody--else" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    other.write_text("a secret")
    (snapshot / "LICENSE").symlink_to(other)
    with pytest.raises(LinkOutside):
        load_supernet(str(snapshot))


def test_what_only_looks_like_a_cache_is_none(place: Place, tmp_path: Path) -> None:
    """A folder `snapshots` in somebody's home makes no blobs of what lies beside it."""
    snapshot = tmp_path / "home" / "snapshots" / "model"
    shutil.copytree(place.model, snapshot)
    (tmp_path / "home" / "blobs").mkdir()
    (tmp_path / "home" / "blobs" / "secret").write_text("a secret")
    (snapshot / "LICENSE").symlink_to("../../blobs/secret")
    with pytest.raises(LinkOutside):
        load_supernet(str(snapshot))


def test_an_adapter_is_held_to_the_same(place: Place, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (tmp_path / "secret.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (adapter / "adapter_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(LinkOutside):
        load_supernet(str(place.model), adapters=(adapter,))


def test_a_shard_index_names_no_file_elsewhere(amoeba: Callable[..., Run], place: Place, tmp_path: Path) -> None:
    (place.model / "model.safetensors").rename(tmp_path / "shard.safetensors")
    index = place.model / "model.safetensors.index.json"
    for shard in ("../shard.safetensors", str(tmp_path / "shard.safetensors"), "a/../../shard.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
        run = amoeba("inspect", place.model)
        assert run.code == 3
        assert "it names a shard outside its folder" in run.err
