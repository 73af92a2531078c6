"""Artifacts opened from disk again, each by the runtime that its users have."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import DynamicCache
from transformers.utils import logging

from amoeba_export.errors import DamagedFile
from amoeba_export.ir.dtype import FLOATS, float_name
from amoeba_export.model.foreign_code import refuse_foreign_code
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.opening import read_model
from amoeba_export.verify.gguf_file import OpenedGguf
from amoeba_export.verify.loaded import cache_name, rope_tables
from amoeba_export.verify.onnx_file import OpenedOnnx
from amoeba_export.verify.opened import LARGE_BYTES, Continuation, Opened, Past, Rope, greedy
from amoeba_export.verify.packed_model import is_packed, read_packed


class OpenedSafetensors:
    """A transformers folder, loaded as transformers loads it; in fp32 arithmetic unless it is very large."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if is_packed(folder):
            self.dtype, model = read_packed(folder)
            self._model = model.eval()
        else:
            self.dtype = _coarsest(folder)
            large = sum(path.stat().st_size for path in folder.glob("*.safetensors")) > LARGE_BYTES
            with ONE_AT_A_TIME, _no_bars():
                self._model = read_model(folder, dtype="auto" if large else torch.float32).eval()
        self._is_exact = self._model.dtype is torch.float32
        self._cache_name = cache_name(self._model)

    def exact(self, rope: Rope) -> OpenedSafetensors | None:
        """See `Opened`."""
        return self if self._is_exact else None

    @property
    def loaded_dtype(self) -> str:
        """What readers that go by the config turn every weight into."""
        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        return float_name(config["dtype"])

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        logits: torch.Tensor = self._model(input_ids, use_cache=False).logits
        return logits.float()

    @torch.no_grad()
    def continued(self, prompt: torch.Tensor, num_tokens: int) -> Continuation:
        """See `Opened`. Not through `generate`: its defaults come from the model and may sample or stop."""
        cache = {self._cache_name: DynamicCache(config=self._model.config)}

        def step(ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self._model(ids, use_cache=True, **cache).logits
            return logits.float()

        return greedy(step, prompt, num_tokens)

    @torch.no_grad()
    def with_past(self, past: Past, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys.to(self._model.dtype), values.to(self._model.dtype), layer)
        logits: torch.Tensor = self._model(input_ids, use_cache=True, **{self._cache_name: cache}).logits
        return logits.float()

    def padded(self, input_ids: torch.Tensor) -> None:
        """See `Opened`: masks and positions are transformers' affair."""

    @torch.no_grad()
    def rope(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Opened`: of the model that the config makes."""
        if self._model.config.max_position_embeddings != num_positions:
            raise DamagedFile(self._folder / "config.json", f"its context is not of {num_positions} positions")
        return rope_tables(self._model, num_positions)


def _coarsest(folder: Path) -> str:
    """The coarsest type of a weight in the files: what was merged into such a weight is rounded to it."""
    names = {dtype.safetensors_name: name for name, dtype in FLOATS.items()}
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {names[file.get_slice(key).get_dtype()] for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise DamagedFile(path, str(error)) from error
        except KeyError as error:
            raise DamagedFile(path, f"it has weights of type {error}") from error
    if not found:
        raise DamagedFile(folder, "it has no weights")
    return max(found, key=list(FLOATS).index)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers draws a bar of its own for every model that it loads, whether or not stderr is a terminal."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


OPENERS: Mapping[str, Callable[[Path], Opened]] = {
    "safetensors": OpenedSafetensors,
    "onnx": OpenedOnnx,
    "gguf": OpenedGguf,
}
"""By the folder's name in an artifact."""


def open_format(name: str, artifact: Path) -> Opened:
    """One format of an artifact. Raises `ForeignCode` when there is code in it that is not amoeba's."""
    refuse_foreign_code(artifact / name)
    return OPENERS[name](artifact / name)
