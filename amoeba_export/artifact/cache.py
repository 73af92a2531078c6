"""A content-addressed cache: what took long to make, found again by what it was made from.

An entry is a folder `<kind>/<sha256 of its key>/`, with the key itself in `key.json`. `get` compares the whole key, so
an entry is never taken for another one. Entries appear in one rename: any number of processes may put and get.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export import locations
from amoeba_export.artifact.reserved import ReservedFolder, sweep

KEY_NAME = "key.json"
_PREFIX = ".making-"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUsage:
    """What the cache holds of one kind."""

    kind: str
    num_entries: int
    size_bytes: int


def canonical_key(facts: Mapping[str, Any]) -> str:
    """One spelling for equal facts: JSON with sorted keys. Raises `TypeError` for what JSON cannot hold."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Cache:
    """The cache below `root` (`locations.cache_dir()` when None). Nothing is made until the first `put`."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or locations.cache_dir()

    def get(self, kind: str, facts: Mapping[str, Any]) -> Path | None:
        """The folder that was put for exactly these facts, or None. A hit counts as a use for `prune`."""
        entry = self._entry(kind, facts)
        try:
            if (entry / KEY_NAME).read_text(encoding="utf-8") != canonical_key(facts):
                return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        with contextlib.suppress(OSError):  # pruned this moment, or a cache that can only be read
            os.utime(entry)
        return entry

    def put(self, kind: str, facts: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """Make the entry for `facts`: `write` fills the empty folder it is given. Returns where the entry is.

        When another process put the same facts first, its entry is kept and ours is dropped.

        Raises:
            CacheUnusable: Nothing can be written there.
        """
        with locations.writing_cache(self.root):
            return self._put(kind, facts, write)

    def _put(self, kind: str, facts: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        entry = self._entry(kind, facts)
        entry.parent.mkdir(parents=True, exist_ok=True)
        sweep(entry.parent, _PREFIX)
        reserved = ReservedFolder(entry.parent, _PREFIX)
        try:
            write(reserved.content)
            (reserved.content / KEY_NAME).write_text(canonical_key(facts), encoding="utf-8")
            try:
                reserved.content.rename(entry)
            except OSError:
                if self.get(kind, facts) is None:  # damaged: something there, but not what was put
                    entry.rename(reserved.root / "damaged")
                    reserved.content.rename(entry)
        finally:
            reserved.release()
        return entry

    def usage(self) -> list[CacheUsage]:
        """What is there, by kind: the first folder level below the root, whoever wrote it."""
        if not self.root.is_dir():
            return []
        usage = [
            CacheUsage(
                kind=kind.name,
                num_entries=sum(not path.name.startswith(".") for path in kind.iterdir()),
                size_bytes=sum(_size_bytes(path) for path in kind.rglob("*")),
            )
            for kind in sorted(self.root.iterdir())
            if kind.is_dir()
        ]
        return [one for one in usage if one.num_entries]

    def prune(self, *, older_than_days: float = 0, kinds: Collection[str] | None = None) -> int:
        """Remove entries unused for that long (0: all), of all kinds or of some. Returns the bytes freed.

        A kind that a process works in (`is_occupied`) is left alone.
        """
        limit = time.time() - older_than_days * 86400
        freed_bytes = 0
        for kind in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if not kind.is_dir() or (kinds is not None and kind.name not in kinds):
                continue
            with _alone_in(kind) as alone:
                freed_bytes += _prune(kind, limit) if alone else 0
            with contextlib.suppress(OSError):  # not empty: a process is putting something there
                kind.rmdir()
        return freed_bytes

    def is_occupied(self, kind: str) -> bool:
        """Whether a process works inside this kind's folder, as a calibration does."""
        with _alone_in(self.root / kind) as alone:
            return not alone

    def _entry(self, kind: str, facts: Mapping[str, Any]) -> Path:
        return self.root / kind / hashlib.sha256(canonical_key(facts).encode()).hexdigest()


@contextlib.contextmanager
def _alone_in(kind: Path) -> Iterator[bool]:
    """Whether nobody works inside; nobody begins to while the context lasts."""
    try:
        descriptor = os.open(kind / locations.OCCUPIED, os.O_RDWR)
    except OSError:  # nobody ever did
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _prune(kind: Path, limit: float) -> int:
    freed_bytes = 0
    sweep(kind, _PREFIX)
    removed = ReservedFolder(kind, _PREFIX)  # an entry vanishes in one rename, as it came
    for entry in sorted(kind.iterdir()):
        if entry.name.startswith(".") or entry.stat().st_mtime > limit:
            continue
        freed_bytes += _size_bytes(entry) + sum(_size_bytes(path) for path in entry.rglob("*"))
        entry.rename(removed.content / entry.name)
    removed.release()
    return freed_bytes


def _size_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except FileNotFoundError:  # another process pruned it while we looked
        return 0
