"""ONNX Runtime GenAI: the loop that applications ship, greedy search included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .device import physical_cores
from .engines import Unavailable


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Version and threads. Raises `Unavailable` when the wheel is not there."""
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise Unavailable(
            f"onnxruntime_genai cannot be imported ({error})", "Install it: pip install 'amoeba-export[genai]'."
        ) from None
    return {
        "runtime": f"onnxruntime-genai {onnxruntime_genai.__version__}",
        "provider": options["provider"],
        "threads": str(options["threads"] or physical_cores()),
    }


def in_main_memory(options: Mapping[str, Any]) -> bool:
    """See `engines.load_engine`."""
    return bool(options["provider"] == "cpu")


def open_model(subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> _Model:
    """Open `folder`, which holds `genai_config.json` and what it names."""
    return _Model(subject, workload, options)


class _Model:
    def __init__(self, subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> None:
        import json

        import numpy as np
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(subject["folder"])
        threads = options["threads"] or physical_cores()
        session = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "1"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        config.clear_providers()
        if options["provider"] != "cpu":
            config.append_provider(options["provider"])
        self._model = onnxruntime_genai.Model(config)
        batch, self._prompt_tokens = workload["batch"], workload["prompt_tokens"]
        self._length = self._prompt_tokens + workload["generate_tokens"] + 1
        self._batch = batch
        self._prompt = np.tile(np.arange(self._prompt_tokens, dtype=np.int32) % 64 + 3, (batch, 1))
        self._token = self._prompt[:, :1]
        self._generator = self._new_generator()
        self._generator.append_tokens(self._prompt)
        self._first = self._new_generator()

    def rewind(self) -> None:
        """Cut the cache back to the prompt."""
        self._generator.rewind_to(self._prompt_tokens)

    def decode(self) -> None:
        """One token after the prompt: the graph, and the choice of the next token."""
        self._generator.append_tokens(self._token)
        self._generator.generate_next_token()

    def prefill(self) -> None:
        """The whole prompt, up to the choice of the first token."""
        self._first.rewind_to(0)
        self._first.append_tokens(self._prompt)
        self._first.generate_next_token()

    def close(self) -> None:
        """Free the model."""
        del self._generator, self._first, self._model

    def _new_generator(self) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._length, batch_size=self._batch, do_sample=False)
        return self._genai.Generator(self._model, parameters)
