from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from amoeba_export.cache import Cache, canonical_key
from amoeba_export.cache.kinds import DIGESTS, KINDS, MODELS, Algorithm, Kind
from amoeba_export.errors import CacheUnusable
from amoeba_export.model.host import Host
from amoeba_export.model.workplace import open_workplace
from tests.conftest import Run
from tests.listener import Listener, flip_bit

TABLES = Kind(name="tables", made_by=(Algorithm(name="measuring", version=1),))
OTHERS = Kind(name="others", made_by=TABLES.made_by)


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
    assert cache.get(TABLES, {"a": 1}) is None
    assert not cache.root.exists()
    entry = cache.put(TABLES, {"a": 1}, writes("one"))
    assert cache.get(TABLES, {"a": 1}) == entry
    assert (entry / "data").read_text() == "one"
    assert cache.get(TABLES, {"a": 2}) is None
    assert cache.get(OTHERS, {"a": 1}) is None


def test_the_first_entry_stays(cache: Cache) -> None:
    cache.put(TABLES, {"a": 1}, writes("one"))
    entry = cache.put(TABLES, {"a": 1}, writes("two"))
    assert (entry / "data").read_text() == "one"
    assert [path.name for path in (cache.root / "tables").iterdir()] == [entry.name]


@pytest.mark.parametrize("damage", ["other key", "no key"])
def test_an_entry_whose_key_differs_is_no_hit_and_is_replaced(cache: Cache, damage: str) -> None:
    """What a hash collision or a tool that wrote into the cache would look like."""
    entry = cache.put(TABLES, {"a": 1}, writes("one"))
    if damage == "other key":
        (entry / "key.json").write_text('{"a":2}')
    else:
        (entry / "key.json").unlink()
    assert cache.get(TABLES, {"a": 1}) is None
    cache.put(TABLES, {"a": 1}, writes("two"))
    found = cache.get(TABLES, {"a": 1})
    assert found is not None
    assert (found / "data").read_text() == "two"


def test_a_failed_put_leaves_nothing(cache: Cache) -> None:
    def fails(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.put(TABLES, {"a": 1}, fails)
    assert list((cache.root / "tables").iterdir()) == []


def test_usage_and_prune(cache: Cache) -> None:
    old = cache.put(TABLES, {"a": 1}, writes("one"))
    new = cache.put(TABLES, {"a": 2}, writes("two"))
    cache.put(MODELS, {"a": 1}, writes("three"))
    (cache.root / "models" / "digest.json").write_text("other rooms write here too")
    by_kind = {one.kind: one for one in cache.usage()}
    assert {kind: one.num_entries for kind, one in by_kind.items()} == {"models": 2, "tables": 2}
    assert all(one.size_bytes > 100 for one in by_kind.values())
    days_ago = time.time() - 10 * 86400
    os.utime(old, (days_ago, days_ago))
    freed = cache.prune(older_than_days=5)
    assert freed == by_kind["tables"].size_bytes // 2
    assert cache.get(TABLES, {"a": 1}) is None
    assert cache.get(TABLES, {"a": 2}) == new
    assert cache.prune(kinds=["models"]) == by_kind["models"].size_bytes
    assert [usage.kind for usage in cache.usage()] == ["tables"]
    assert cache.prune() == freed
    assert cache.usage() == []
    assert Cache(cache.root / "absent").usage() == []
    assert Cache(cache.root / "absent").prune() == 0


def test_a_hit_counts_as_a_use(cache: Cache) -> None:
    entry = cache.put(TABLES, {"a": 1}, writes("one"))
    os.utime(entry, (0, 0))
    cache.get(TABLES, {"a": 1})
    assert cache.prune(older_than_days=1) == 0


@pytest.mark.parametrize("kind", [TABLES, MODELS], ids=["hashed at each use", "hashed when a file changed"])
@pytest.mark.parametrize("damage", ["content", "key", "seal", "missing", "added"])
def test_a_damaged_entry_is_made_anew_with_a_note(cache: Cache, kind: Kind, damage: str) -> None:
    def write(folder: Path) -> None:
        (folder / "data").write_text("first")
        (folder / "more").mkdir()
        (folder / "more" / "weights").write_bytes(bytes(100))

    listener = Listener()
    entry = cache.put(kind, {"a": 1}, write)
    assert cache.get(kind, {"a": 1}, progress=listener) == entry
    assert listener.notes == []
    match damage:
        case "content":
            flip_bit(entry / "more" / "weights", 50)
        case "key":
            flip_bit(entry / "key.json")
        case "seal":
            flip_bit(entry / "seal.json", 20)
        case "missing":
            (entry / "data").unlink()
        case "added":
            (entry / "more" / "weights.index").write_text("{}")
    assert cache.get(kind, {"a": 1}, progress=listener) is None
    assert listener.told_of_damage() == [f"{entry} in the cache is damaged; it is made again."]
    assert cache.put(kind, {"a": 1}, write) == entry
    assert cache.get(kind, {"a": 1}, progress=listener) == entry
    assert (entry / "more" / "weights").read_bytes() == bytes(100)
    assert listener.notes == []
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_another_version_of_what_made_it_is_not_reused(cache: Cache, kind: Kind) -> None:
    for position in range(len(kind.made_by)):
        made_by = list(kind.made_by)
        made_by[position] = replace(made_by[position], version=made_by[position].version + 1)
        newer = replace(kind, made_by=tuple(made_by))
        cache.put(kind, {"a": 1}, writes("old"))
        assert cache.get(newer, {"a": 1}) is None
        entry = cache.put(newer, {"a": 1}, writes("new"))
        assert (entry / "data").read_text() == "new"
        found = cache.get(kind, {"a": 1})
        assert found is not None
        assert (found / "data").read_text() == "old"


def test_every_kind_has_a_folder_and_versions_of_its_own() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert all(kind.versions for kind in KINDS)
    assert len({algorithm.name: None for kind in KINDS for algorithm in kind.made_by}) == len(
        {algorithm for kind in KINDS for algorithm in kind.made_by}
    )


def test_an_entry_can_be_replaced(cache: Cache) -> None:
    cache.put(TABLES, {"a": 1}, writes("one"))
    entry = cache.put(TABLES, {"a": 1}, writes("two"), again=True)
    assert cache.get(TABLES, {"a": 1}) == entry
    assert (entry / "data").read_text() == "two"
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_a_remembered_digest_is_checked_and_has_a_version(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, path = Listener(), tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, (1e9, 1e9))
    expected = hashlib.sha256(b"one").hexdigest()
    assert cache.sha256(path) == expected
    (remembered,) = (cache.root / DIGESTS.name).iterdir()
    for position in (3, 70, -1):
        flip_bit(remembered, position)
        assert cache.sha256(path, progress=listener) == expected
        assert listener.told_of_damage() == [f"{remembered} in the cache is damaged; weights is hashed again."]
        assert cache.sha256(path, progress=listener) == expected
        assert listener.notes == []
    newer = replace(DIGESTS, made_by=(replace(DIGESTS.made_by[0], version=99),))
    monkeypatch.setattr("amoeba_export.cache.store.DIGESTS", newer)
    assert cache.sha256(path) == expected
    assert len(list((cache.root / DIGESTS.name).iterdir())) == 2


_PUT = """
import sys
from pathlib import Path
from amoeba_export.cache import Cache
from amoeba_export.cache.kinds import Algorithm, Kind
T = Kind(name="t", made_by=(Algorithm(name="a", version=1),))
cache = Cache(Path(sys.argv[1]))
for i in range(30):
    entry = cache.put(T, {"i": i}, lambda folder: (folder / "data").write_text(str(i) * 1000))
    assert (entry / "data").read_text() == str(i) * 1000
    assert cache.get(T, {"i": i}) == entry
"""


def test_processes_put_the_same_entries_at_once(cache: Cache) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", _PUT, str(cache.root)]) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert cache.usage()[0].num_entries == 30
    assert not list((cache.root / "t").glob(".*"))


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
        cache.put(TABLES, {"a": 1}, fails)
    assert str(caught.value) == (
        f"The cache cannot be written: {reason}.\n"
        f"  where: {cache.root}\n"
        "  next:  Free space there ('amoeba cache prune'), or set AMOEBA_CACHE to a folder that you may write to."
    )
    assert list((cache.root / "tables").iterdir()) == []


def test_what_is_refused_elsewhere_is_not_the_caches_fault(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        cache.put(TABLES, {"a": 1}, raising(PermissionError(errno.EACCES, "no", str(tmp_path / "model"))))


def raising(error: Exception) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        raise error

    return write


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("x")
    cache = Cache(tmp_path / "cache")
    assert cache.get(TABLES, {"a": 1}) is None
    assert cache.usage() == []
    assert cache.prune() == 0
    with pytest.raises(CacheUnusable, match=r"cannot be written: (Not a directory|File exists)\."):
        cache.put(TABLES, {"a": 1}, writes("one"))


def test_a_hit_in_a_cache_that_can_only_be_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache.put(TABLES, {"a": 1}, writes("one"))

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get(TABLES, {"a": 1}) == entry


def test_a_running_calibration_is_not_pruned(
    cache: Cache, amoeba: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(cache.root))
    cache.put(TABLES, {"a": 1}, writes("one"))
    with open_workplace("model", Host(cache_dir=cache.root)):
        (cache.root / "calibration" / "scores").write_text("known")
        assert cache.is_occupied("calibration")
        run = amoeba("cache", "prune", "--json")
        answer = json.loads(run.out)
        assert answer["freed_bytes"] > 0
        assert (answer["path"], answer["occupied"]) == (str(cache.root), ["calibration"])
        assert run.err == "warning: 'calibration' was left alone: a running command works in it.\n"
        assert (cache.root / "calibration" / "scores").read_text() == "known"
    assert not cache.is_occupied("calibration")
    assert cache.prune() == 5
    assert cache.usage() == []
