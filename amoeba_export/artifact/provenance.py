"""`provenance.json`: what an artifact was made from, in the words that supply-chain tools read.

An in-toto statement v1 (https://github.com/in-toto/attestation, spec/v1/statement.md) with an SLSA provenance v1
predicate (https://slsa.dev/spec/v1.0/provenance). Subjects are the artifact's files, dependencies its inputs and the
packages that computed it. It says nothing of when and where, so that equal inputs give equal bytes; whoever signs it
vouches for that. `docs/provenance.md` documents the build type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from amoeba_export.artifact.checksums import FileEntry
from amoeba_export.errors import InputError
from amoeba_export.ir import InputId
from amoeba_export.reading import decode, read_json_object

PROVENANCE_NAME = "provenance.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILDER = "https://github.com/amoeba-export/amoeba"
BUILD_TYPE = f"{BUILDER}/blob/main/docs/provenance.md#export-v1"


def provenance_text(
    parameters: Mapping[str, Any], inputs: Sequence[InputId], tool: Mapping[str, str], files: Sequence[FileEntry]
) -> str:
    """The bytes of `provenance.json`.

    Args:
        parameters: What was asked for; JSON values.
        inputs: Model, strategy and adapters, by content.
        tool: Versions of amoeba and of what it computes with.
        files: Every file of the artifact but this one and the manifest.
    """
    packages = [
        {"uri": f"pkg:pypi/{quote(name)}@{quote(version)}"} for name, version in tool.items() if name != "amoeba"
    ]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": file.path, "digest": {"sha256": file.sha256}} for file in files],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": parameters,
                "resolvedDependencies": [*map(_dependency, inputs), *packages],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"amoeba": tool["amoeba"]}}},
        },
    }
    return json.dumps(statement, indent=2, allow_nan=False) + "\n"


def provenance_problems(path: Path, inputs: Sequence[InputId], files: Sequence[FileEntry], expected: str) -> list[str]:
    """Where the statement contradicts the manifest, in words.

    Args:
        path: The statement.
        inputs: Of the manifest.
        files: As for `provenance_text`.
        expected: The text that the manifest implies.
    """
    try:
        statement = read_json_object(path, what="The provenance statement")
        kinds = (statement["_type"], statement["predicateType"])
        subjects = {decode(str, one["name"]): one["digest"]["sha256"] for one in statement["subject"]}
        dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        decode(list[dict[str, Any]], dependencies, "resolvedDependencies")
    except InputError as error:
        return [f"{path.name} cannot be read ({error.what})"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path.name} is not a provenance statement ({type(error).__name__}: {error})"]
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        return [f"{path.name} is a statement of another kind ({', '.join(map(str, kinds))})"]
    known = {file.path: file.sha256 for file in files}
    problems = [f"{path.name} does not attest {name}" for name in known if name not in subjects]
    for name, sha256 in subjects.items():
        if name not in known:
            problems.append(f"{path.name} attests {name}, which is not in the manifest")
        elif sha256 != known[name]:
            problems.append(f"{path.name} attests other content of {name}")
    problems += [
        f"{path.name} does not name the {one.role} {one.id}" for one in inputs if _dependency(one) not in dependencies
    ]
    if not problems:
        problems = [f"{path.name} contradicts the manifest: {key}" for key in _other(statement, expected)]
    return problems


def _other(statement: dict[str, Any], expected: str) -> list[str]:
    """The keys in which a statement differs from the expected one."""
    wanted = json.loads(expected)
    of_predicate = [key for key in ("buildDefinition", "runDetails") if _differs(statement, wanted, "predicate", key)]
    other = [key for key in {**wanted, **statement} if statement.get(key) != wanted.get(key)]
    return of_predicate or other


def _differs(one: dict[str, Any], other: dict[str, Any], *keys: str) -> bool:
    for key in keys:
        one, other = one.get(key, {}), other.get(key, {})
    return one != other


def _dependency(one: InputId) -> dict[str, Any]:
    return {"name": one.role, "digest": {"sha256": one.sha256}, "annotations": {"id": one.id}}
