"""torch's elementwise functions are called once by one thread, before several threads can share their first call.

oneMKL picks the kernel of a function during its first call. When threads share this call, one of them can get a kernel
of low accuracy: errors of 1e-4 in cos, exp and others, once a process, without a word
(https://github.com/pytorch/pytorch/issues/188792).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FUNCTIONS = (
    *("abs", "ceil", "floor", "round", "trunc", "sqrt", "exp", "expm1", "log", "log10", "log1p", "log2", "lgamma"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "erf", "erfc", "erfinv"),
)
"""The names, in torch, of the functions that it may give to oneMKL."""


def call_once_torch_is_here() -> None:
    """Call `FUNCTIONS` now if torch is imported, else right after its import, whoever imports it."""
    if hasattr(sys.modules.get("torch"), "zeros"):
        _call_all(sys.modules["torch"])
    elif not any(isinstance(finder, _TorchFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchFinder())


def _call_all(torch: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(one)


class _TorchFinder(importlib.abc.MetaPathFinder):
    """Finds torch as it is found without it, and calls the functions at the end of its import."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            spec.loader = _TorchLoader(spec.loader)
        return spec


class _TorchLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader  # torch reads its own spec
        self._loader.exec_module(module)
        _call_all(module)
