"""Artifact: a folder that appears whole or not at all, a manifest that says what is in it."""

from amoeba_export.artifact.check import verify_checksums
from amoeba_export.artifact.checksums import FileEntry, file_entry, list_files, sha256_file
from amoeba_export.artifact.manifest import MANIFEST_NAME, PLAN_NAME, Manifest, is_artifact, read_manifest
from amoeba_export.artifact.provenance import PROVENANCE_NAME
from amoeba_export.artifact.records import (
    ContinuationRecord,
    FullModelRecord,
    LatencyRecord,
    LayerCounts,
    RefitRecord,
    ShapeRecord,
    VerificationRecord,
    VocabularyRecord,
)
from amoeba_export.artifact.staging import Staging, check_destination, check_file_destination
from amoeba_export.artifact.versions import tool_versions

__all__ = [
    "MANIFEST_NAME",
    "PLAN_NAME",
    "PROVENANCE_NAME",
    "ContinuationRecord",
    "FileEntry",
    "FullModelRecord",
    "LatencyRecord",
    "LayerCounts",
    "Manifest",
    "RefitRecord",
    "ShapeRecord",
    "Staging",
    "VerificationRecord",
    "VocabularyRecord",
    "check_destination",
    "check_file_destination",
    "file_entry",
    "is_artifact",
    "list_files",
    "read_manifest",
    "sha256_file",
    "tool_versions",
    "verify_checksums",
]
