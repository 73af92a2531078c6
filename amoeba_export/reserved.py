"""Folders that belong to one running process: locked while it works, swept when it died.

A killed process cannot clean up. So every temporary folder carries a `lock` file that its owner holds with `flock`; the
kernel drops the lock with the process, and whoever comes next sweeps what nobody holds. Process ids would not do: they
are reused, and mean nothing in another container that shares the disk.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path

from amoeba_export import leftovers

LOCK_NAME = "lock"


class ReservedFolder:
    """A fresh folder `<prefix><random>` in `parent`, removed by `release`. Work goes into `content`, beside the lock.

    Raises:
        OSError: The folder cannot be made in `parent`.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        self._lock: int | None = None
        while self._lock is None:
            self.root = parent / f"{prefix}{secrets.token_hex(4)}"
            self._noted = leftovers.note(self.release)  # ahead of the folder: an interrupt may come between the two
            try:
                self.root.mkdir(mode=0o700)
                self._lock = _take_lock(self.root / LOCK_NAME)
            finally:
                if self._lock is None:  # it cannot be made, or was swept by another process before it was locked
                    leftovers.forget(self._noted)
        self.content = self.root / "content"
        self.content.mkdir()

    def release(self) -> None:
        """Remove the folder with all that is left in it. A second call does nothing."""
        lock, self._lock = self._lock, None
        leftovers.remove_folder(self.root)  # what cannot be removed now is swept by the next run
        if lock is not None:
            os.close(lock)
        leftovers.forget(self._noted)


def sweep(parent: Path, prefix: str) -> list[Path]:
    """Remove the reserved folders of processes that are gone, and return them."""
    swept = []
    for root in sorted(parent.iterdir()):
        if not root.name.startswith(prefix) or not root.is_dir():
            continue
        try:
            lock = _take_lock(root / LOCK_NAME)
        except OSError:  # not ours to open: another user's, or it is being removed this moment
            continue
        if lock is not None:
            shutil.rmtree(root, ignore_errors=True)
            os.close(lock)
            swept.append(root)
    return swept


def _take_lock(path: Path) -> int | None:
    """Lock `path`, made if missing; None when another process holds it or removed it before we had it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
