"""llama.cpp: the server of the xllamacpp wheel in this process, or a `llama-bench` program. Both keep the time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from . import llama_bench
from .device import physical_cores
from .engines import Unavailable
from .llama_bench import DECODE_TOKENS


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Version, devices and threads. Raises `Unavailable` when the wheel or the program is not there."""
    if options["binary"]:
        return llama_bench.describe(options)
    try:
        import xllamacpp  # noqa: F401 - only whether it loads
    except ImportError as error:
        raise Unavailable(
            f"xllamacpp cannot be imported ({error})",
            "Install it: pip install 'amoeba-export[llamacpp]'. Or name a llama-bench of yours in options.binary.",
        ) from None
    return {
        "runtime": f"xllamacpp {version('xllamacpp')}",
        "provider": "GPU" if options["gpu_layers"] else "CPU",
        "threads": str(options["threads"] or physical_cores()),
    }


def in_main_memory(options: Mapping[str, Any]) -> bool:
    """See `engines.load_engine`."""
    return bool(not options["gpu_layers"])


def open_model(subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> Any:
    """Load the GGUF file `model` in `folder`."""
    if workload["batch"] != 1:
        raise ValueError("llama.cpp is timed with one sequence; use --batch 1")
    return (llama_bench.Model if options["binary"] else _Model)(subject, workload, options)


class _Model:
    def __init__(self, subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> None:
        import xllamacpp

        prompt = workload["prompt_tokens"]
        params = xllamacpp.CommonParams()
        params.model.path = os.path.join(subject["folder"], subject["model"])  # noqa: PTH118 - startup counts
        params.n_ctx = prompt + workload["generate_tokens"] + 2 * DECODE_TOKENS
        params.n_parallel = 1
        params.n_gpu_layers = options["gpu_layers"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"] or physical_cores()
        params.warmup = True
        params.fit_params = False
        params.verbosity = -1
        params.chat_template = "chatml"  # nothing is a chat here, and the file's own may be beyond llama.cpp's parser
        self._server = xllamacpp.Server(params)
        self._prompt = [number % 64 + 3 for number in range(prompt)]
        self._before = self._prompt[: max(1, prompt - DECODE_TOKENS // 2)]

    def decode(self) -> float:
        """Milliseconds per token around the KV length. The first token comes from the prompt's logits and is free."""
        timings = self._complete(self._before, DECODE_TOKENS + 1, keep_prompt=True)
        return float(timings["predicted_ms"]) / float(timings["predicted_n"] - 1)

    def prefill(self) -> float:
        """Milliseconds of the whole prompt."""
        return float(self._complete(self._prompt, 1, keep_prompt=False)["prompt_ms"])

    def close(self) -> None:
        """Stop the server."""
        del self._server

    def _complete(self, tokens: list[int], count: int, *, keep_prompt: bool) -> Mapping[str, Any]:
        request = {
            "prompt": tokens,
            "n_predict": count,
            "cache_prompt": keep_prompt,
            "ignore_eos": True,
            "samplers": ["top_k"],
            "top_k": 1,
        }
        reply = self._server.handle_completions(request)
        if "timings" not in reply:
            raise RuntimeError(f"llama.cpp answered {reply}")
        timings: Mapping[str, Any] = reply["timings"]
        return timings
