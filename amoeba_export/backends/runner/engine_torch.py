"""PyTorch through transformers, eager or compiled, on CPU or CUDA."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from .device import physical_cores
from .engines import Unavailable


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Versions, device and mode. Raises `Unavailable` when a package or the device is not there."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Unavailable(f"{error.name} cannot be imported ({error})", "Install torch and transformers.") from None
    if options["device"].startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device here", 'Use a machine with one, or device = "cpu".')
    facts = {
        "runtime": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "provider": options["device"],
        "mode": "compiled" if options["compile"] else "eager",
        "threads": str(options["threads"] or physical_cores()),
    }
    if options["device"].startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(options["device"])
    return facts


def in_main_memory(options: Mapping[str, Any]) -> bool:
    """See `engines.load_engine`."""
    return bool(options["device"] == "cpu")


def open_model(subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> _Model:
    """Load the Hugging Face directory `folder`; `random` says that it has no weights and gets random ones."""
    return _Model(subject, workload, options)


def _opening() -> Any:
    """Amoeba's own way to open a folder: from its package, or from beside this file on a device that it was sent to.

    Never from the model's folder, whose code may be anybody's.
    """
    if __package__ == "amoeba_export.backends.runner":
        return importlib.import_module("amoeba_export.model.opening")
    return importlib.import_module(".opening", __package__)


class _Model:
    def __init__(self, subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> None:
        import torch
        from transformers import DynamicCache, StaticCache

        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        torch.set_num_threads(options["threads"] or physical_cores())
        self._torch, self._device = torch, options["device"]
        folder, dtype = subject["folder"], getattr(torch, subject["dtype"])
        opening = _opening()
        if subject["random"]:
            model = opening.blank_model(opening.read_config(folder), dtype=dtype)
        else:
            model = opening.read_model(folder, dtype=dtype)
        self._model = model.eval().to(self._device)
        renamed = "cache" in inspect.signature(model.forward).parameters  # since transformers 5.24
        self._cache_name = "cache" if renamed else "past_key_values"
        batch, self._prompt_tokens = workload["batch"], workload["prompt_tokens"]
        length = self._prompt_tokens + workload["generate_tokens"]
        # As transformers' own generate does it: decode is compiled, with a cache of fixed size; the prompt is not.
        self._new_cache: Callable[[], Any] = (
            (lambda: StaticCache(config=self._model.config, max_cache_len=length))
            if options["compile"]
            else (lambda: DynamicCache(config=self._model.config))
        )
        self._forward = self._model
        if options["compile"]:
            mode = "reduce-overhead" if self._device.startswith("cuda") else "default"
            self._forward = torch.compile(self._model, mode=mode)
        prompt = torch.arange(self._prompt_tokens) % 64 + 3
        self._prompt = prompt.repeat(batch, 1).to(self._device)
        self._token = self._prompt[:, :1]
        self._cache = self._filled()

    def rewind(self) -> None:
        """Cut the cache back to the prompt."""
        excess = int(self._cache.get_seq_length()) - self._prompt_tokens
        if not excess:
            return
        if not self._cache.is_compileable:
            self._cache.crop(-excess)  # by how much: transformers 5 takes no absolute length any more
            return
        for layer in self._cache.layers:  # a cache of fixed size cannot be cropped, only told where to go on
            if layer.is_initialized:
                layer.cumulative_length.sub_(excess)

    def decode(self) -> None:
        """One token after the prompt."""
        self._step(self._forward, self._token, self._cache)

    def prefill(self) -> None:
        """The whole prompt, from an empty cache."""
        self._filled()

    def close(self) -> None:
        """Free the model."""
        del self._model, self._forward, self._cache

    def _filled(self) -> Any:
        cache = self._new_cache()
        self._step(self._model, self._prompt, cache)
        return cache

    def _step(self, forward: Any, tokens: Any, cache: Any) -> None:
        with self._torch.no_grad():
            forward(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        if self._device.startswith("cuda"):
            self._torch.cuda.synchronize(self._device)
