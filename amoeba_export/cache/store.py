"""A content-addressed cache: what took long to make, found again by what it was made from.

An entry is a folder `<kind>/<sha256 of its key>/`, with the key itself in `key.json` and the sha256 of every file in
`seal.json`. `get` compares the whole key, so an entry is never taken for another one, and the content with the seal, so
a damaged one is made anew. Entries appear in one rename: any number of processes may put and get.
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
from amoeba_export.cache.kinds import DIGESTS, Kind
from amoeba_export.cache.sealed import file_digest, is_sound, read_sealed, seal_folder, write_sealed
from amoeba_export.ir import SILENT, Progress
from amoeba_export.reserved import ReservedFolder, sweep

KEY_NAME = "key.json"

LAYOUT = 2
"""Of an entry: in every key, as the versions of its kind are."""

SETTLED_SECONDS = 2.0
"""A file younger than this could change again within one tick of its clock; its digest is not remembered."""

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

    def get(self, kind: Kind, facts: Mapping[str, Any], *, progress: Progress = SILENT) -> Path | None:
        """The folder that was put for exactly these facts, or None. A hit counts as a use for `prune`.

        One that is there and not as it was put is none either: it is removed, and `progress` is told.
        """
        entry = self._entry(kind, facts)
        if not entry.is_dir():
            return None
        if not self._is_whole(kind, facts, entry):
            progress.note(f"{entry} in the cache is damaged; it is made again.")
            self._remove(entry)
            return None
        with contextlib.suppress(OSError):  # another user's, or on a disk that cannot be written
            os.utime(entry)
        return entry

    def put(self, kind: Kind, facts: Mapping[str, Any], write: Callable[[Path], None], *, again: bool = False) -> Path:
        """Make the entry for `facts`: `write` fills the empty folder it is given. Returns where the entry is.

        Where there is a sound one already, such as another process's, it is kept and ours is dropped; with `again`,
        ours takes its place.

        Raises:
            CacheUnusable: Nothing can be written there.
        """
        with locations.writing_cache(self.root):
            return self._put(kind, facts, write, again=again)

    def _put(self, kind: Kind, facts: Mapping[str, Any], write: Callable[[Path], None], *, again: bool) -> Path:
        entry = self._entry(kind, facts)
        entry.parent.mkdir(parents=True, exist_ok=True)
        sweep(entry.parent, _PREFIX)
        reserved = ReservedFolder(entry.parent, _PREFIX)
        try:
            write(reserved.content)
            (reserved.content / KEY_NAME).write_text(_key(kind, facts), encoding="utf-8")
            seal_folder(reserved.content)
            if again:
                self._make_room(entry, reserved)
            try:
                reserved.content.rename(entry)
            except OSError:
                if not self._is_whole(kind, facts, entry):
                    self._make_room(entry, reserved)
                    reserved.content.rename(entry)
        finally:
            reserved.release()
        return entry

    def get_json(self, kind: Kind, facts: Mapping[str, Any], name: str, *, progress: Progress = SILENT) -> Any | None:
        """What `put_json` was given for exactly these facts, or None. As `get`."""
        entry = self.get(kind, facts, progress=progress)
        return None if entry is None else json.loads((entry / name).read_text(encoding="utf-8"))

    def put_json(self, kind: Kind, facts: Mapping[str, Any], name: str, data: object, *, again: bool = False) -> None:
        """Make an entry that is one JSON file of this name. As `put`."""
        text = json.dumps(data)

        def write(folder: Path) -> None:
            (folder / name).write_text(text, encoding="utf-8")

        self.put(kind, facts, write, again=again)

    def sha256(self, path: Path, *, progress: Progress = SILENT) -> str:
        """sha256 of a file, remembered for as long as its path, size, times and inode stay what they are."""
        stat = path.stat()
        facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        key = _key(DIGESTS, {"file": facts})
        remembered = self.root / DIGESTS.name / hashlib.sha256(key.encode()).hexdigest()
        known = read_sealed(remembered)
        if known is not None:
            return known.decode("ascii")
        if remembered.is_file():
            progress.note(f"{remembered} in the cache is damaged; {path.name} is hashed again.")
        digest = file_digest(path)
        if time.time() - stat.st_mtime > SETTLED_SECONDS:
            # A cache that cannot be written costs time, not correctness.
            with contextlib.suppress(OSError):
                remembered.parent.mkdir(parents=True, exist_ok=True)
                write_sealed(remembered, digest.encode())
        return digest

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

    def _entry(self, kind: Kind, facts: Mapping[str, Any]) -> Path:
        return self.root / kind.name / hashlib.sha256(_key(kind, facts).encode()).hexdigest()

    def _is_whole(self, kind: Kind, facts: Mapping[str, Any], entry: Path) -> bool:
        try:
            same = (entry / KEY_NAME).read_text(encoding="utf-8") == _key(kind, facts)
        except (OSError, ValueError):
            return False
        return same and is_sound(entry, self.sha256 if kind.is_large else file_digest)

    def _remove(self, entry: Path) -> None:
        """In one rename, as it came. Where that cannot be done, `put` will try again."""
        with contextlib.suppress(OSError):
            removed = ReservedFolder(entry.parent, _PREFIX)
            try:
                self._make_room(entry, removed)
            finally:
                removed.release()

    def _make_room(self, entry: Path, reserved: ReservedFolder) -> None:
        """Move what is at `entry`, if anything, to where it goes with `reserved`."""
        with contextlib.suppress(FileNotFoundError):
            entry.rename(reserved.root / "replaced")


def _key(kind: Kind, facts: Mapping[str, Any]) -> str:
    return canonical_key({"layout": LAYOUT, "made_by": kind.versions, "facts": dict(facts)})


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
