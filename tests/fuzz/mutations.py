"""Hypothesis strategies that damage valid files: their structure, their figures, or their bytes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

DEEP = "\x01deep\x01"
RAW = ("NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400, "-0", "1e999999999", "9" * 5000)
_MARK = "\x01raw{}\x01"
"""Texts that stand for what a Python value cannot be; they are replaced once the file is text."""

EVIL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.0, -0.5, 0.5, 1e-310, 1e12, 1e18, 1e300, -1e300),
    *(2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**9, 10**12, 10**18),
    *("", "x", "0", "1e9", "a\0b", "\ud800", "\u202e\x1b[31m", "{0}", "../x", "/", ".", "1/0", "3x0.5", "1e999x1"),
    *("9" * 5000, "ä" * 300, "(a+)+$", "["),
    *([], {}, [[]], [{}], [None], {"": None}, {"0": 0}, [1, "1", None], [0] * 3000),
    *(DEEP, *(_MARK.format(i) for i in range(len(RAW)))),
)  # fmt: skip


def evil() -> st.SearchStrategy[Any]:
    """A value that few readers expect."""
    return st.one_of(
        st.sampled_from(EVIL),
        st.integers(-5, 10**6),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
    )


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `value`, at most 2,000 of them."""
    waiting = [(place, value)]
    found = 0
    while waiting and found < 2000:
        place, value = waiting.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            found += 1
            yield (*place, key)
            waiting.append(((*place, key), item))


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """`valid` (dicts, lists and scalars) with one to three values dropped, renamed, retyped, repeated or swapped."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(data))
        if not known:
            return copy.deepcopy(draw(evil()))
        # Half of the time the first levels: there are few of them, and most of what a reader decides hangs on them.
        if draw(st.booleans()):
            known = [place for place in known if len(place) <= 2]
        place = draw(st.sampled_from(known))
        parent = data
        for key in place[:-1]:
            parent = parent[key]
        key = place[-1]
        match draw(st.sampled_from(("set", "set", "set", "drop", "rename", "repeat", "swap", "nest"))):
            case "set":
                parent[key] = copy.deepcopy(draw(evil()))  # or a later step would change the list of them
            case "drop":
                del parent[key]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.sampled_from(("", "x", str(key).upper(), "0", "-1", "a\0", "9" * 30)))] = parent.pop(key)
            case "repeat" if isinstance(parent, list):
                parent.extend(copy.deepcopy(parent[key]) for _ in range(draw(st.sampled_from((1, 2, 500)))))
            case "swap":
                other = data
                for step in draw(st.sampled_from(known)):
                    if not (isinstance(other, dict) and step in other) and not (
                        isinstance(other, list) and isinstance(step, int) and step < len(other)
                    ):
                        break
                    other = other[step]
                parent[key] = copy.deepcopy(other)
            case _:
                parent[key] = draw(st.sampled_from(([parent[key]], {"x": parent[key]})))
    return data


def _unmarked(text: str, opening: str = "[", closing: str = "]") -> str:
    for i, raw in enumerate(RAW):
        text = text.replace(json.dumps(_MARK.format(i)), raw)
    return text.replace(json.dumps(DEEP), opening * 50_000 + closing * 50_000)


def json_text(data: Any) -> str:
    """`data` as JSON, or what looks like it."""
    return _unmarked(json.dumps(data))


def toml_text(data: Any) -> str:
    """`data` as TOML, or what looks like it; headers for tables at the top."""
    if not isinstance(data, dict):
        return _toml_value(data)
    lines, headers = [], []
    for key, value in data.items():
        name = json.dumps(key)
        if isinstance(value, dict):
            headers += [f"[{name}]", *(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items())]
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for item in value:
                headers += [f"[[{name}]]", *(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in item.items())]
        else:
            lines.append(f"{name} = {_toml_value(value)}")
    return _unmarked("\n".join([*lines, *headers, ""])).replace("Infinity", "inf").replace("NaN", "nan")


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return "1979-05-27" if value is None else json.dumps(value)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut, flipped, doubled, or with something else in the middle."""
    where = draw(st.integers(0, len(content)))
    match draw(st.sampled_from(("cut", "flip", "insert", "count", "replace"))):
        case "cut":
            return content[:where]
        case "flip":
            return content[:where] + bytes([draw(st.integers(0, 255))]) + content[where + 1 :]
        case "insert":
            return content[:where] + draw(st.binary(max_size=16)) + content[where:]
        case "count":  # a length field, with some luck
            number = draw(st.sampled_from((0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)))
            packed = struct.pack("<Q", number)[: draw(st.sampled_from((4, 8)))]
            return content[:where] + packed + content[where + len(packed) :]
        case _:
            return draw(st.binary(max_size=64))


def files(form: str, valid: Path) -> st.SearchStrategy[bytes]:
    """Damaged versions of the valid file at `valid`."""
    content = valid.read_bytes()
    structural = _FORMS[form](content) if form in _FORMS else st.nothing()
    return st.one_of(structural, structural, structural, damaged(content), structural.flatmap(damaged))


def _json(content: bytes) -> st.SearchStrategy[bytes]:
    data = json.loads(content)
    doubled = st.tuples(mutated(data), mutated(data)).map(
        lambda two: json_text(two[0])[:-1] + "," + json_text(two[1])[1:]
    )
    return st.one_of(mutated(data).map(json_text), mutated(data).map(json_text), doubled).map(_bytes)


def _toml(content: bytes) -> st.SearchStrategy[bytes]:
    return mutated(tomllib.loads(content.decode())).map(toml_text).map(_bytes)


def _jsonl(content: bytes) -> st.SearchStrategy[bytes]:
    records = [json.loads(line) for line in content.splitlines()]
    lines = mutated(records).filter(lambda made: isinstance(made, list))
    return lines.map(lambda made: "\n".join(map(json_text, made))).map(_bytes)


def _safetensors(content: bytes) -> st.SearchStrategy[bytes]:
    """The header is mutated: its tensors, and the JSON text that may be in its metadata."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]

    def packed(made: Any) -> bytes:
        text = _bytes(json_text(made))
        return struct.pack("<Q", len(text)) + text + body

    choices = [mutated(header).map(packed)]
    for key, text in header.get("__metadata__", {}).items():
        if text.startswith("{"):
            inner = mutated(json.loads(text)).map(json_text)
            choices += [inner.map(lambda text, key=key: packed({**header, "__metadata__": {key: text}}))] * 2
    return st.one_of(choices)


NESTED = (
    lambda depth: b"\x80\x04)" + b"\x85" * depth + b".",  # a tuple
    lambda depth: b"\x80\x04})" + b"\x85" * depth + b"Ns.",  # as a key, which is hashed
    lambda depth: b"\x80\x04})" + b"N\x86" * depth + b"Ns.",
    lambda depth: b"\x80\x04}" + b"(" * depth + b")" + b"t" * depth + b"Ns.",
    lambda depth: b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b".",  # lists
)
"""Pickles of values that are nested so deeply."""


def _npy(content: bytes) -> st.SearchStrategy[bytes]:
    """The pickled tables are mutated; arrays become lists for that and arrays again. Deep tuples as they are."""
    start = content.index(b"\x80\x04") if b"\x80\x04" in content[:200] else content.index(b"\x80")
    data = np.load(io.BytesIO(content), allow_pickle=True).item()

    def saved(made: Any) -> bytes:
        try:
            return content[:start] + pickle.dumps(np.array(_arrays(made), dtype=object).reshape(()), protocol=4)
        except (ValueError, RecursionError, OverflowError):
            return content[:start] + pickle.dumps(made, protocol=4)

    depths = st.sampled_from((10, 100, 1000, 200_000))
    deep = st.tuples(depths, st.sampled_from(NESTED)).map(lambda two: content[:start] + two[1](two[0]))
    return st.one_of(mutated(data).map(saved), mutated(data).map(saved), damaged(content[start:]).map(
        lambda part: content[:start] + part), deep)  # fmt: skip


def _arrays(value: Any) -> Any:
    return {key: _arrays(item) for key, item in value.items()} if isinstance(value, dict) else value


def _zip(content: bytes) -> st.SearchStrategy[bytes]:
    """The pickle inside is damaged, and the archive around it is sound again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def packed(members: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return out.getvalue()

    def one(name: str) -> st.SearchStrategy[bytes]:
        return damaged(members[name]).map(lambda data: packed({**members, name: data}))

    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    without = st.sampled_from(sorted(members)).map(
        lambda gone: packed({name: data for name, data in members.items() if name != gone})
    )
    return st.one_of(one(pickled), one(pickled), one(pickled), st.sampled_from(sorted(members)).flatmap(one), without)


_WORDS = tuple(
    value.to_bytes(size, "little", signed=value < 0)
    for size, values in ((4, (0, 1, 7, 8, 9, 12, 255, 2**31, 2**32 - 1)), (8, (0, 1, 2**16, 2**32, 2**63, 2**64 - 1)))
    for value in values
)
"""Counts, lengths and types of values that few readers expect."""


def _gguf(content: bytes) -> st.SearchStrategy[bytes]:
    """One to three words of the header become others: counts, lengths, types, dims, offsets, figures."""
    header = content.rindex(b"output_norm.weight") + 64

    def changed(changes: list[tuple[int, bytes]]) -> bytes:
        made = bytearray(content)
        for where, word in changes:
            made[where : where + len(word)] = word
        return bytes(made)

    return st.lists(st.tuples(st.integers(4, header), st.sampled_from(_WORDS)), min_size=1, max_size=3).map(changed)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


_FORMS = {
    "json": _json,
    "toml": _toml,
    "jsonl": _jsonl,
    "safetensors": _safetensors,
    "npy": _npy,
    "zip": _zip,
    "gguf": _gguf,
}
