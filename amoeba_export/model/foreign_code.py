"""Code in an artifact that amoeba did not put there.

Nothing of ours would run it (`opening.py`); whoever loads the artifact with `trust_remote_code=True`, or in another
runtime, would. So it is named and refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from amoeba_export.errors import ForeignCode
from amoeba_export.reading import parse_json_object

MODELING = "modeling_amoeba.py"
"""The one code file of an artifact, copied beside weights that no stock model type can hold."""

AUTO_MAP = {
    "AutoConfig": "modeling_amoeba.AmoebaConfig",
    "AutoModelForCausalLM": "modeling_amoeba.AmoebaForCausalLM",
}
"""How the `config.json` of such weights names it."""

_CODE = (".py", ".pyc", ".pyd", ".so", ".dylib", ".dll", ".pth", ".pkl", ".pickle")


def modeling_file() -> Path:
    """Our own `modeling_amoeba.py`."""
    return Path(__file__).with_name(MODELING)


def refuse_foreign_code(folder: Path) -> None:
    """Look through an artifact, or one format's folder of it. Reads no weight, runs nothing.

    Raises:
        ForeignCode: It has a file of code other than our own, byte for byte; or a setting that names code, a library or
            another model.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in _CODE and not _is_ours(path):
            known = "differs from the file of this amoeba" if path.name == MODELING else "is none of its files"
            raise ForeignCode(path, f"{name} {known}")
        if path.name == "adapter_config.json":
            raise ForeignCode(path, f"{name} would make transformers load another model")
        if path.match("*config.json") and path.is_file():
            for problem in _named_code(_content(path), path.name):
                raise ForeignCode(path, problem)


def _is_ours(path: Path) -> bool:
    return path.name == MODELING and path.is_file() and path.read_bytes() == modeling_file().read_bytes()


def _content(path: Path) -> Mapping[str, Any]:
    """Of a settings file; what cannot be read names nothing, and is somebody else's error."""
    try:
        return parse_json_object(path.read_bytes(), any_text=True)
    except ValueError:
        return {}


def _named_code(content: Mapping[str, Any], name: str) -> Iterator[str]:
    named = content.get("auto_map")
    if named is not None and not (name == "config.json" and named == AUTO_MAP):
        yield f"auto_map in {name} names {json.dumps(named)}"
    if name == "config.json":
        for key in ("attn_implementation", "_attn_implementation"):
            if (attention := content.get(key)) not in (None, "eager", "sdpa"):
                yield f"{key} in {name} names {json.dumps(attention)}"
    if name == "genai_config.json":
        yield from (f"{key} in {name} names {json.dumps(value)}" for key, value in _libraries(content))


def _libraries(content: Any) -> Iterator[tuple[str, Any]]:
    """What ONNX Runtime GenAI would load beside the graph: libraries of operators and of providers, other folders."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if key == "session_options" and isinstance(value, dict):
            yield from ((k, v) for k, v in value.items() if v and k != "log_id" and not isinstance(v, bool | int))
        elif key == "filename" and not (isinstance(value, str) and PurePath(value).name == value):
            yield key, value
        elif isinstance(value, dict | list):
            yield from _libraries(value)
