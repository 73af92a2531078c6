"""Artifacts opened from disk again, each by the runtime that its users have."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import DynamicCache
from transformers.utils import logging

from amoeba_export.errors import DamagedFile
from amoeba_export.ir.dtype import FLOATS
from amoeba_export.model.foreign_code import refuse_foreign_code
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.opening import read_model
from amoeba_export.verify.gguf_file import OpenedGguf
from amoeba_export.verify.opened import Continuation, Opened, greedy

LARGE_BYTES = 4 << 30
"""Weights of more bytes than this keep their dtype in memory: an fp32 copy may not fit. Arithmetic is then theirs."""


class OpenedSafetensors:
    """A transformers folder, loaded as transformers loads it; in fp32 arithmetic unless it is very large."""

    def __init__(self, folder: Path) -> None:
        self.dtype = _coarsest(folder)
        large = sum(path.stat().st_size for path in folder.glob("*.safetensors")) > LARGE_BYTES
        with ONE_AT_A_TIME, _no_bars():
            self._model = read_model(folder, dtype="auto" if large else torch.float32).eval()
        renamed = "cache" in inspect.signature(self._model.forward).parameters  # since transformers 5.24
        self._cache_name = "cache" if renamed else "past_key_values"

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


class OpenedOnnx:
    """`model.onnx` in ONNX Runtime on the CPU: prefill and decode through the same graph."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()  # for who imported it before amoeba, which set the variable too late
        self.dtype = _onnx_dtype(folder / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()  # of this thread: others may verify beside it
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        return self._step(input_ids, self._empty())[0]

    def continued(self, prompt: torch.Tensor, num_tokens: int) -> Continuation:
        """See `Opened`."""
        past: Mapping[str, np.ndarray[Any, Any]] = self._empty()

        def step(ids: torch.Tensor) -> torch.Tensor:
            nonlocal past
            logits, past = self._step(ids, past)
            return logits

        return greedy(step, prompt, num_tokens)

    def _empty(self) -> dict[str, np.ndarray[Any, Any]]:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, head_dim = value.shape
                past[name] = np.zeros((1, heads, 0, head_dim), dtype=kinds[value.type])
        return past

    def _step(
        self, input_ids: torch.Tensor, past: Mapping[str, np.ndarray[Any, Any]]
    ) -> tuple[torch.Tensor, dict[str, np.ndarray[Any, Any]]]:
        seen = next((values.shape[2] for values in past.values()), 0)
        length = input_ids.shape[1]
        known = {
            "input_ids": input_ids.numpy(),
            "attention_mask": np.ones((1, seen + length), dtype=np.int64),
            "position_ids": np.arange(seen, seen + length, dtype=np.int64)[None],
        }
        feeds = {**{name: values for name, values in known.items() if name in self._inputs}, **past}
        results = dict(zip(self._outputs, self._session.run(None, feeds), strict=True))
        present = {name.replace("present.", "past_key_values."): v for name, v in results.items() if name != "logits"}
        return torch.from_numpy(results["logits"].astype(np.float32)), present


def _onnx_dtype(path: Path) -> str:
    """`int4` or `int8` when the graph has quantized matmuls, else the dtype of its embedding and linears."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            return f"int{next(a.i for a in node.attribute if a.name == 'bits')}"
    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    matrices = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2]
    return next(names[kind] for kind in matrices if kind in names)


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
