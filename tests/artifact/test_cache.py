from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from amoeba_export.artifact import Cache, CacheUsage, canonical_key
from amoeba_export.errors import CacheUnusable
from amoeba_export.model.workplace import open_workplace
from tests.conftest import Run


def writes(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "data").write_text(text)

    return write


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_a_key_has_one_spelling() -> None:
    assert canonical_key({"b": [1, 2.5], "a": None}) == canonical_key({"a": None, "b": [1, 2.5]})
    assert canonical_key({"a": None, "b": [1, 2.5]}) == '{"a":null,"b":[1,2.5]}'
    with pytest.raises(TypeError):
        canonical_key({"a": Path()})


def test_get_finds_what_was_put(cache: Cache) -> None:
    assert cache.get("tables", {"a": 1}) is None
    assert not cache.root.exists()
    entry = cache.put("tables", {"a": 1}, writes("one"))
    assert cache.get("tables", {"a": 1}) == entry
    assert (entry / "data").read_text() == "one"
    assert cache.get("tables", {"a": 2}) is None
    assert cache.get("others", {"a": 1}) is None


def test_the_first_entry_stays(cache: Cache) -> None:
    cache.put("tables", {"a": 1}, writes("one"))
    entry = cache.put("tables", {"a": 1}, writes("two"))
    assert (entry / "data").read_text() == "one"
    assert [path.name for path in (cache.root / "tables").iterdir()] == [entry.name]


@pytest.mark.parametrize("damage", ["other key", "no key"])
def test_an_entry_whose_key_differs_is_no_hit_and_is_replaced(cache: Cache, damage: str) -> None:
    """What a hash collision or a tool that wrote into the cache would look like."""
    entry = cache.put("tables", {"a": 1}, writes("one"))
    if damage == "other key":
        (entry / "key.json").write_text('{"a":2}')
    else:
        (entry / "key.json").unlink()
    assert cache.get("tables", {"a": 1}) is None
    cache.put("tables", {"a": 1}, writes("two"))
    found = cache.get("tables", {"a": 1})
    assert found is not None
    assert (found / "data").read_text() == "two"


def test_a_failed_put_leaves_nothing(cache: Cache) -> None:
    def fails(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.put("tables", {"a": 1}, fails)
    assert list((cache.root / "tables").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EROFS, "x"), "Read-only file system"),
        (RuntimeError("Error while serializing: I/O error: No space (os error 28)"), "No space left on device"),
    ],
)
def test_a_cache_that_cannot_be_written(error: Exception, reason: str, cache: Cache) -> None:
    def fails(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise error

    with pytest.raises(CacheUnusable) as caught:
        cache.put("tables", {"a": 1}, fails)
    assert str(caught.value) == (
        f"The cache cannot be written: {reason}.\n"
        f"  where: {cache.root}\n"
        "  next:  Free space there ('amoeba cache prune'), or set AMOEBA_CACHE to a folder that you may write to."
    )
    assert list((cache.root / "tables").iterdir()) == []


def test_what_is_refused_elsewhere_is_not_the_caches_fault(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        cache.put("tables", {"a": 1}, raising(PermissionError(errno.EACCES, "no", str(tmp_path / "model"))))


def raising(error: Exception) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        raise error

    return write


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    cache = Cache(tmp_path / "cache")
    assert cache.get("tables", {"a": 1}) is None
    assert cache.usage() == []
    assert cache.prune() == 0
    with pytest.raises(CacheUnusable, match=r"cannot be written: (Not a directory|File exists)\."):
        cache.put("tables", {"a": 1}, writes("one"))


def test_a_hit_in_a_cache_that_can_only_be_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache.put("tables", {"a": 1}, writes("one"))

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get("tables", {"a": 1}) == entry


def test_a_running_calibration_is_not_pruned(
    cache: Cache, amoeba: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(cache.root))
    cache.put("tables", {"a": 1}, writes("one"))
    with open_workplace("model", cache.root):
        (cache.root / "calibration" / "scores").write_text("known")
        assert cache.is_occupied("calibration")
        run = amoeba("cache", "prune", "--json")
        assert json.loads(run.out) == {"path": str(cache.root), "freed_bytes": 10, "occupied": ["calibration"]}
        assert run.err == "warning: 'calibration' was left alone: a running command works in it.\n"
        assert (cache.root / "calibration" / "scores").read_text() == "known"
    assert not cache.is_occupied("calibration")
    assert cache.prune() == 5
    assert cache.usage() == []


def test_usage_and_prune(cache: Cache) -> None:
    old = cache.put("tables", {"a": 1}, writes("one"))
    new = cache.put("tables", {"a": 2}, writes("two"))
    cache.put("models", {"a": 1}, writes("three"))
    (cache.root / "models" / "digest.json").write_text("other rooms write here too")
    assert cache.usage() == [
        CacheUsage(kind="models", num_entries=2, size_bytes=5 + 7 + 26),
        CacheUsage(kind="tables", num_entries=2, size_bytes=2 * (3 + 7)),
    ]
    days_ago = time.time() - 10 * 86400
    os.utime(old, (days_ago, days_ago))
    assert cache.prune(older_than_days=5) == 10
    assert cache.get("tables", {"a": 1}) is None
    assert cache.get("tables", {"a": 2}) == new
    assert cache.prune(kinds=["models"]) == 38
    assert [usage.kind for usage in cache.usage()] == ["tables"]
    assert cache.prune() == 10
    assert cache.usage() == []
    assert Cache(cache.root / "absent").usage() == []
    assert Cache(cache.root / "absent").prune() == 0


def test_a_hit_counts_as_a_use(cache: Cache) -> None:
    entry = cache.put("tables", {"a": 1}, writes("one"))
    os.utime(entry, (0, 0))
    cache.get("tables", {"a": 1})
    assert cache.prune(older_than_days=1) == 0


_PUT = """
import sys
from pathlib import Path
from amoeba_export.artifact import Cache
cache = Cache(Path(sys.argv[1]))
for i in range(30):
    entry = cache.put("t", {"i": i}, lambda folder: (folder / "data").write_text(str(i) * 1000))
    assert (entry / "data").read_text() == str(i) * 1000
    assert cache.get("t", {"i": i}) == entry
"""


def test_processes_put_the_same_entries_at_once(cache: Cache) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", _PUT, str(cache.root)]) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert cache.usage()[0].num_entries == 30
    assert not list((cache.root / "t").glob(".*"))
