from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amoeba_export.artifact import MANIFEST_NAME, PROVENANCE_NAME, Staging, read_manifest, sha256_file, verify_checksums
from amoeba_export.errors import InputError
from tests.artifact.manifests import manifest

ABC = hashlib.sha256(b"abc").hexdigest()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    publish(tmp_path / "out")
    return tmp_path / "out"


def publish(out: Path) -> None:
    with Staging(out) as staging:
        (staging.folder / "onnx").mkdir()
        (staging.folder / "onnx" / "model.onnx").write_text("abc")
        staging.publish(manifest(tool={"amoeba": "0.1.0", "torch": "2.13.0+cpu"}))


def test_the_statement_is_in_toto_and_slsa(artifact: Path) -> None:
    assert json.loads((artifact / PROVENANCE_NAME).read_text()) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "onnx/model.onnx", "digest": {"sha256": ABC}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "https://github.com/amoeba-export/amoeba/blob/main/docs/provenance.md#export-v1",
                "externalParameters": {
                    "model": "demo",
                    "target": "cpu",
                    "shape": "1x0.5",
                    "formats": ["onnx"],
                    "dtype": "fp32",
                },
                "resolvedDependencies": [
                    {"name": "model", "digest": {"sha256": "ab" * 32}, "annotations": {"id": "demo"}},
                    {"uri": "pkg:pypi/torch@2.13.0%2Bcpu"},
                ],
            },
            "runDetails": {
                "builder": {"id": "https://github.com/amoeba-export/amoeba", "version": {"amoeba": "0.1.0"}}
            },
        },
    }


def test_equal_inputs_give_equal_bytes(artifact: Path, tmp_path: Path) -> None:
    publish(tmp_path / "again")
    assert (tmp_path / "again" / PROVENANCE_NAME).read_bytes() == (artifact / PROVENANCE_NAME).read_bytes()


def _other_subject(statement: dict[str, Any]) -> None:
    statement["subject"][0]["digest"]["sha256"] = "00"


def _no_subject(statement: dict[str, Any]) -> None:
    statement["subject"] = [{"name": "gguf/model.gguf", "digest": {"sha256": ABC}}]


def _other_model(statement: dict[str, Any]) -> None:
    statement["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["sha256"] = "00"


def _other_kind(statement: dict[str, Any]) -> None:
    statement["predicateType"] = "https://spdx.dev/Document"


def _other_parameters(statement: dict[str, Any]) -> None:
    statement["predicate"]["buildDefinition"]["externalParameters"]["dtype"] = "fp16"


def _other_builder(statement: dict[str, Any]) -> None:
    statement["predicate"]["runDetails"]["builder"]["id"] = "https://example.org"


def _more(statement: dict[str, Any]) -> None:
    statement["signed"] = True


def _no_predicate(statement: dict[str, Any]) -> None:
    del statement["predicate"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_other_subject, "provenance.json attests other content of onnx/model.onnx"),
        (
            _no_subject,
            "provenance.json does not attest onnx/model.onnx; "
            "provenance.json attests gguf/model.gguf, which is not in the manifest",
        ),
        (_other_model, "provenance.json does not name the model demo"),
        (
            _other_kind,
            "provenance.json is a statement of another kind "
            "(https://in-toto.io/Statement/v1, https://spdx.dev/Document)",
        ),
        (_other_parameters, "provenance.json contradicts the manifest: buildDefinition"),
        (_other_builder, "provenance.json contradicts the manifest: runDetails"),
        (_more, "provenance.json contradicts the manifest: signed"),
        (_no_predicate, "provenance.json is not a provenance statement (KeyError: 'predicate')"),
    ],
)
def test_a_statement_that_contradicts_the_manifest(
    artifact: Path, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    """Even one whose digest the manifest has: manifest and statement must tell the same story."""
    path = artifact / PROVENANCE_NAME
    before = path.read_bytes()
    statement = json.loads(before)
    change(statement)
    path.write_text(json.dumps(statement))
    known = next(file for file in read_manifest(artifact).files if file.path == PROVENANCE_NAME)
    listed = (artifact / MANIFEST_NAME).read_text().replace(known.sha256, sha256_file(path))
    listed = listed.replace(f'"size_bytes": {known.size_bytes}', f'"size_bytes": {path.stat().st_size}')
    (artifact / MANIFEST_NAME).write_text(listed)
    with pytest.raises(InputError) as caught:
        verify_checksums(artifact)
    assert caught.value.what == f"The artifact is not as it was written: {problem}."


def test_an_artifact_without_a_statement(artifact: Path) -> None:
    (artifact / PROVENANCE_NAME).unlink()
    with pytest.raises(InputError, match=r": provenance\.json is missing\."):
        verify_checksums(artifact)
