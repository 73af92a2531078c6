from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from amoeba_export.artifact import (
    FileEntry,
    Manifest,
    ShapeRecord,
    Staging,
    VerificationRecord,
    list_files,
    read_manifest,
    sha256_file,
    verify_checksums,
)
from amoeba_export.errors import DamagedFile, InputError, NotAsWritten, NotFound
from amoeba_export.ir import LayerPlan, Shape, SubnetPlan
from tests.artifact.manifests import manifest


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with Staging(tmp_path / "out") as staging:
        (staging.folder / "plan.json").write_text("{}")
        (staging.folder / "onnx").mkdir()
        (staging.folder / "onnx" / "model.onnx").write_text("abc")
        staging.publish(manifest())
    return tmp_path / "out"


def test_the_keys_are_the_documented_ones() -> None:
    data = json.loads(manifest().to_text())
    assert list(data) == [
        "schema_version",
        "model",
        "shape",
        "dtype",
        "latency",
        "quality",
        "verification",
        "inputs",
        "files",
        "tool",
        "dims",
        "reference",
    ]
    assert data["shape"] == {
        "depth": 1,
        "width": 0.5,
        "layers": [{"source_layer": 3, "query_heads": 3, "kv_heads": 1, "ffn": 48}],
    }
    assert data["latency"] == {
        "metric": "decode",
        "percentile": 50,
        "budget_ms": 20.0,
        "predicted_ms": 18.5,
        "measured_ms": {"p50": 19.0, "p90": 21.0},
        "source": "measured",
        "target": "cpu",
        "workload": {"prompt_tokens": 128, "generate_tokens": 128, "batch": 1},
        "uncertainty": 0.05,
        "full_dtype": None,
        "device": {"threads": "2"},
    }
    assert data["verification"] == {"max_abs_diff": 1e-5, "max_rel_diff": 1e-6, "greedy_tokens_equal": True}
    assert data["inputs"] == [{"role": "model", "id": "demo", "sha256": "ab" * 32}]


def test_what_is_quantized_says_what_that_did() -> None:
    record = VerificationRecord(
        max_abs_diff=20.0, max_rel_diff=0.5, greedy_tokens_equal=True, mean_kl=0.25, perplexity_ratio=1.3
    )
    data = json.loads(manifest(verification=record).to_text())
    assert data["verification"] == {
        "max_abs_diff": 20.0,
        "max_rel_diff": 0.5,
        "greedy_tokens_equal": True,
        "mean_kl": 0.25,
        "perplexity_ratio": 1.3,
    }
    assert Manifest.from_json(data).verification == record


def test_a_diff_of_two_manifests_can_be_read() -> None:
    text = manifest().with_files([FileEntry(path="a", size_bytes=1, sha256="00")]).to_text()
    assert '"shape": {"depth": 1, "width": 0.5, "layers": [\n' in text
    assert '      {"source_layer": 3, "query_heads": 3, "kv_heads": 1, "ffn": 48}\n' in text
    assert '  "files": [\n    {"path": "a", "size_bytes": 1, "sha256": "00"}\n  ],\n' in text


def test_the_dims_come_back_as_an_architecture() -> None:
    architecture = dataclasses.replace(manifest().architecture(), rope_scaling={"rope_type": "llama3", "factor": 8.0})
    dims = dataclasses.asdict(architecture)
    del dims["config"]
    written = manifest(dims=dims)
    assert Manifest.from_json(json.loads(written.to_text())).architecture() == architecture


@pytest.mark.parametrize("changes", [{}, {"latency": None, "quality": None, "verification": None}])
def test_reads_what_it_wrote(changes: dict[str, None]) -> None:
    written = manifest(**changes).with_files([FileEntry(path="a", size_bytes=1, sha256="00")])
    assert Manifest.from_json(json.loads(written.to_text())) == written


def test_what_counts_against_the_budget() -> None:
    measured = manifest().latency
    assert measured is not None
    assert (measured.is_estimate, measured.actual_ms) == (False, 19.0)
    estimate = manifest(latency=None)
    assert estimate.latency is None


def test_the_shape_holds_counts_of_the_plan() -> None:
    plan = SubnetPlan(
        shape=Shape(1, 0.5),
        policy="uniform",
        layers=(LayerPlan(source_layer=2, query_heads=(0, 1), kv_heads=(0,), ffn=(1, 5, 7)),),
    )
    record = ShapeRecord.of(plan)
    assert record.shape == Shape(1, 0.5)
    (layer,) = record.layers
    assert (layer.source_layer, layer.query_heads, layer.kv_heads, layer.ffn) == (2, 2, 1, 3)


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c").write_bytes(b"")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "b") == abc
    assert [(file.path, file.size_bytes) for file in list_files(tmp_path)] == [("a/c", 0), ("b", 3)]


def test_every_difference_is_named(artifact: Path) -> None:
    verify_checksums(artifact)
    (artifact / "onnx" / "model.onnx").write_text("abd")
    (artifact / "plan.json").unlink()
    (artifact / "notes.txt").write_text("x")
    with pytest.raises(InputError) as caught:
        verify_checksums(artifact)
    assert caught.value.what == (
        "The artifact is not as it was written: plan.json is missing; notes.txt is not in the manifest; "
        "onnx/model.onnx has other content."
    )
    (artifact / "onnx" / "model.onnx").write_text("abcd")
    with pytest.raises(InputError, match="onnx has 4 bytes instead of 3"):
        verify_checksums(artifact)


def test_what_is_no_plain_file_is_named(artifact: Path) -> None:
    """Neither opened nor followed: a FIFO would be read for ever."""
    os.mkfifo(artifact / "onnx" / "pipe")
    (artifact / "empty" / "inner").mkdir(parents=True)
    (artifact / "aside").symlink_to(artifact / "onnx")
    kept = (artifact / "plan.json").rename(artifact.parent / "plan.json")
    (artifact / "plan.json").symlink_to(kept)
    with pytest.raises(NotAsWritten) as caught:
        verify_checksums(artifact)
    assert caught.value.problems == (
        "aside is a link",
        "empty is a folder without a file of the manifest",
        "plan.json is a link",
        "empty/inner is a folder without a file of the manifest",
        "onnx/pipe is not a plain file",
    )


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        f"The artifact's manifest was not found: {tmp_path}/amoeba.json\n"
        "  next:  Give a folder that 'amoeba export' wrote."
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ('{"schema_version": 1}', "it is not a manifest .it has no key 'model'"),
        ('{"schema_version": 9}', "schema version 9; this amoeba reads 1"),
        ("{}", "it is not a manifest .it has no schema_version"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "amoeba.json").write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(tmp_path / "amoeba.json")
    assert isinstance(caught.value, DamagedFile) or "schema" in reason
