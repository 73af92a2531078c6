"""What wrote an artifact: versions, read from the installed packages without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from amoeba_export.version import __version__

_TOOLS = ("torch", "transformers", "safetensors", "onnx", "onnxruntime", "gguf", "numpy")


def tool_versions() -> dict[str, str]:
    """Versions of amoeba and of what it computes with, as installed."""
    versions = {"amoeba": __version__}
    for name in _TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
