"""Staging: an artifact is built in a hidden folder beside its destination and moved there in one rename.

Whatever kills the process, the destination is absent, or what it was before, or complete.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from amoeba_export import leftovers
from amoeba_export.artifact.checksums import file_entry, list_files
from amoeba_export.artifact.manifest import MANIFEST_NAME, Manifest, is_artifact
from amoeba_export.artifact.provenance import PROVENANCE_NAME
from amoeba_export.errors import AmoebaError, InputError, NotReplaceable, OutputExists, ReadOnlyOutput, UsageError
from amoeba_export.locations import require_utf8
from amoeba_export.reserved import ReservedFolder, sweep

LONGEST_SHOWN_BYTES = 200
"""Names that are not longer are part of the name of their staging folder."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """A destination, checked before any work, and the folder in which its content is built.

        with Staging(out, force=force) as staging:
            ...write into staging.folder, verify, measure...
            manifest = staging.publish(manifest)

    Leaving without `publish` removes everything, parents that were made for `out` included. Folders that killed runs
    left beside `out` are removed on entry.

    Args:
        out: The artifact to be. Missing parents are made.
        force: Replace an artifact (or an empty folder) that is already there. Anything else is never replaced.

    Raises:
        OutputExists: `out` exists and `force` is not set.
        NotReplaceable: `out` exists and is not an artifact.
        ReadOnlyOutput: Nothing can be written there.
    """

    def __init__(self, out: Path, *, force: bool = False) -> None:
        check_destination(out, force=force)
        self.out = out.expanduser().resolve()
        self._force = force
        self._reserved: ReservedFolder | None = None
        self._made_parents: list[Path] = []

    @property
    def folder(self) -> Path:
        """Where the artifact's files are written, under their final relative paths."""
        assert self._reserved is not None, "a staging folder exists only inside its with block"
        return self._reserved.content

    def __enter__(self) -> Self:
        prefix = _prefix(self.out)
        self._noted = leftovers.note(self._remove_parents)
        try:
            parent = self.out.parent
            self._made_parents = [path for path in (parent, *parent.parents) if not path.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            sweep(self.out.parent, prefix)
            self._reserved = ReservedFolder(self.out.parent, prefix)
        except OSError as error:
            self._remove_parents()
            raise _explained(error, self.out) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._reserved is not None
        self._reserved.release()
        self._remove_parents()
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise _explained(error, self.out) from error
        if isinstance(error, AmoebaError) and error.where:  # no user can look into a folder that is gone
            error.where = error.where.replace(str(self.folder), str(self.out))

    def clear(self) -> None:
        """Remove what was written so far: the next smaller plan is about to be built."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def publish(self, manifest: Manifest) -> Manifest:
        """Add the provenance statement, flush every file, write the manifest last, and move the folder to `out`.

        Returns:
            The manifest as written: with the list of files.
        """
        files, statement = list_files(self.folder), self.folder / PROVENANCE_NAME
        statement.write_text(manifest.provenance(files), encoding="utf-8")
        complete = manifest.with_files(sorted((*files, file_entry(statement, self.folder)), key=lambda file: file.path))
        (self.folder / MANIFEST_NAME).write_text(complete.to_text(), encoding="utf-8")
        for path in _bottom_up(self.folder):
            _sync(path)
        if self._force and self.out.exists():
            _exchange(self.folder, self.out)  # the old artifact is now in the reserved folder, and goes with it
        elif self.out.exists():  # came into being while we worked
            raise OutputExists(self.out)
        else:
            self.folder.rename(self.out)
        _sync(self.out.parent)
        self._made_parents = []
        return complete

    def _remove_parents(self) -> None:
        leftovers.forget(self._noted)
        for parent in self._made_parents:
            try:
                parent.rmdir()
            except OSError:  # somebody else put something there meanwhile
                return


def check_destination(out: Path, *, force: bool) -> None:
    """The checks of `Staging`, for who wants them before anything else. Writes nothing."""
    resolved = _resolved(out)
    if resolved.exists():
        if not force:
            raise OutputExists(out)
        if not (is_artifact(resolved) or (resolved.is_dir() and not any(resolved.iterdir()))):
            raise NotReplaceable(out)
    _check_writable(out, resolved)


def check_file_destination(out: Path) -> None:
    """The checks for a single file, which is replaced when it exists. Writes nothing.

    Raises:
        UsageError: `out` is a folder.
        ReadOnlyOutput: Nothing can be written there.
    """
    resolved = _resolved(out)
    if resolved.is_dir():
        raise UsageError(f"The output '{out}' is a folder.", next_step="Give the name of a file.")
    _check_writable(out, resolved)


def _resolved(out: Path) -> Path:
    """`out` as an absolute path that the file system can look up."""
    try:
        resolved = out.expanduser().resolve()
        require_utf8(resolved)
        resolved.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return resolved
    except OSError as error:  # a name that is too long, a loop of links
        raise _explained(error, out) from error
    return resolved


def _check_writable(out: Path, resolved: Path) -> None:
    existing = next(parent for parent in resolved.parents if parent.exists())
    if not existing.is_dir():
        raise ReadOnlyOutput(out, f"{existing} is a file")
    # root may write anywhere; a folder whose mode lets nobody write was still meant to stay as it is
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.stat().st_mode & 0o222:
        raise ReadOnlyOutput(out, f"{existing} is read-only")


def _prefix(out: Path) -> str:
    """What staging folders of `out` begin with. A name of up to 255 bytes leaves no room for more: then its digest."""
    name = os.fsencode(out.name)
    shown = out.name if len(name) <= LONGEST_SHOWN_BYTES else hashlib.sha256(name).hexdigest()[:32]
    return f".{shown}.amoeba-"


def _bottom_up(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder, topdown=False):
        yield from (Path(root) / name for name in names)
        yield Path(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can, in two renames where it cannot."""
    if sys.platform == "linux":
        at_fdcwd, rename_exchange = -100, 2
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28, musl 1.2.4
        if renameat2 and renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
            return
    aside = new.with_name("replaced")
    old.rename(aside)
    new.rename(old)


def _explained(error: OSError, out: Path) -> InputError:
    if error.errno in _DISK_FULL:
        return InputError(
            "The disk is full.", where=out, next_step="Free some space, or choose an --out on another disk."
        )
    return ReadOnlyOutput(out, error.strerror or str(error))
