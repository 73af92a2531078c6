"""Is an artifact's folder what its manifest says, and does its statement say the same?"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from amoeba_export.artifact.checksums import FileEntry, relative, sha256_file
from amoeba_export.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from amoeba_export.artifact.provenance import PROVENANCE_NAME, provenance_problems
from amoeba_export.errors import NotAsWritten


def verify_checksums(folder: Path) -> Manifest:
    """Compare everything in an artifact's folder with its manifest, and the provenance statement with both.

    Raises:
        NotFound: There is no manifest.
        InputError: The manifest is not one.
        NotAsWritten: With every file that is missing, changed, or not in the manifest, every link, folder and device
            that does not belong there, and all that the statement says otherwise.
    """
    manifest = read_manifest(folder)
    known = {entry.path: entry for entry in manifest.files}
    problems = [f"{MANIFEST_NAME} lists {path} twice" for path in sorted(_twice(manifest.files))]
    plain: dict[str, Path] = {}
    for path in _walk(folder):
        name = relative(path, folder)
        problem = _out_of_place(path, name, known)
        if problem:
            problems.append(f"{name} {problem}")
        elif path.is_file():
            plain[name] = path
    problems = [f"{name} is missing" for name in known if not os.path.lexists(folder / name)] + problems
    problems += [f"{name} {change}" for name, path in plain.items() if (change := _change(path, known.get(name)))]
    if PROVENANCE_NAME not in known:
        problems.append(f"{PROVENANCE_NAME} is not in the manifest")
    elif PROVENANCE_NAME in plain:
        attested = [entry for entry in manifest.files if entry.path != PROVENANCE_NAME]
        problems += provenance_problems(
            plain[PROVENANCE_NAME], manifest.inputs, attested, manifest.provenance(attested)
        )
    if problems:
        raise NotAsWritten(folder, problems)
    return manifest


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below `folder`, whatever it is, sorted. Links are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root) / name for name in sorted((*folders, *names)))


def _twice(files: tuple[FileEntry, ...]) -> set[str]:
    paths = [entry.path for entry in files]
    return {path for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else set()


def _out_of_place(path: Path, name: str, known: dict[str, FileEntry]) -> str | None:
    """What is wrong with there being something at `path`, or None."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "is a link"
    if stat.S_ISDIR(mode):
        return (
            None if any(one.startswith(f"{name}/") for one in known) else "is a folder without a file of the manifest"
        )
    if not stat.S_ISREG(mode):
        return "is not a plain file"
    return None if name in known or name == MANIFEST_NAME else "is not in the manifest"


def _change(path: Path, entry: FileEntry | None) -> str | None:
    """How a file differs from its entry; the manifest has none."""
    if entry is None:
        return None
    if (size_bytes := path.stat().st_size) != entry.size_bytes:
        return f"has {size_bytes:,} bytes instead of {entry.size_bytes:,}"
    return "has other content" if sha256_file(path) != entry.sha256 else None
