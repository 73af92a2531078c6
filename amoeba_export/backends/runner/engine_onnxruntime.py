"""ONNX Runtime: one graph for prefill and decode, everything bound beforehand, so that Python costs next to nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .device import physical_cores
from .engines import Unavailable, advice_for

ELEMENT_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX's numbers of the types that a KV cache may have."""

_ADD = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808"
    "0112040a02080142040a00100d"
)
"""An ONNX model that adds a number to itself: y [1] = x [1] + x."""


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Version, providers and threads. Raises `Unavailable` when the wheel or a provider is not there."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"onnxruntime cannot be imported ({error})", "Install it: pip install onnxruntime.") from None
    available = onnxruntime.get_available_providers()
    missing = [name for name in options["providers"] if name not in available]
    if missing:
        raise Unavailable(
            f"this onnxruntime has no {' and no '.join(missing)}, only {', '.join(available)}",
            "Install the build of onnxruntime that has it (onnxruntime-gpu for CUDA and TensorRT).",
        )
    prove(onnxruntime, options["providers"][0])
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "provider": ", ".join(options["providers"]),
        "threads": str(options["threads"] or physical_cores()),
        "spinning": str(options["spinning"]).lower(),
    }


def prove(onnxruntime: Any, provider: str) -> None:
    """Add two numbers with `provider`: one is listed where it was compiled in, whether or not it runs here.

    Raises:
        Unavailable: It does not run, or another one stepped in.
    """
    if provider == "CPUExecutionProvider":
        return
    import numpy as np

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(_ADD, settings, providers=[provider])
        used = session.get_providers()
        if used[:1] == [provider]:
            session.run(None, {"x": np.ones(1, np.float32)})
            return
        reason = f"onnxruntime lists {provider} and runs on {used[0]} in its place"
    except Exception as error:  # whatever the provider's libraries raise
        reason = f"onnxruntime lists {provider}, and an inference on it fails ({str(error).strip()[:300]})"
    advice = "Install the libraries that it needs on the device (for CUDA: the CUDA and cuDNN of its release)."
    raise Unavailable(reason, advice_for(reason) or advice)


def in_main_memory(options: Mapping[str, Any]) -> bool:
    """See `engines.load_engine`."""
    return list(options["providers"]) == ["CPUExecutionProvider"]


def open_model(subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> _Model:
    """Open `model` in `folder`, whose heads have `head_dim`; `shared_kv`: past and present are one buffer."""
    return _Model(subject, workload, options)


class _Model:
    def __init__(self, subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options["threads"] or physical_cores()
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options["spinning"] else "0")
        for key, value in options["session"].items():
            settings.add_session_config_entry(key, value)
        providers = [(name, options["provider_options"].get(name, {})) for name in options["providers"]]
        path = os.path.join(subject["folder"], subject["model"])  # noqa: PTH118 - runs where startup counts
        self._session = onnxruntime.InferenceSession(path, settings, providers=providers)
        first = options["providers"][0]
        self._device = "cuda" if first.startswith(("CUDA", "Tensorrt", "NvTensorRT")) else "cpu"
        self._workload, self._head_dim = workload, subject["head_dim"]
        self._held: list[Any] = []  # onnxruntime reads the arrays that CPU values were made from, and does not own them
        prompt = workload["prompt_tokens"]
        self._capacity = prompt + workload["generate_tokens"] if subject.get("shared_kv") else 0
        self._decode = self._bind(new_tokens=1, past_tokens=prompt)
        self._prefill = self._bind(new_tokens=prompt, past_tokens=0)

    def decode(self) -> None:
        """One token after a KV cache of `prompt_tokens`; the cache is left as it was."""
        self._run(self._decode)

    def prefill(self) -> None:
        """The whole prompt, from an empty cache."""
        self._run(self._prefill)

    def close(self) -> None:
        """Free the session."""
        del self._decode, self._prefill, self._session, self._held

    def _run(self, binding: Any) -> None:
        self._session.run_with_iobinding(binding)
        if self._device != "cpu":
            binding.synchronize_outputs()

    def _bind(self, *, new_tokens: int, past_tokens: int) -> Any:
        import numpy as np
        from onnxruntime import OrtValue

        batch, total = self._workload["batch"], past_tokens + new_tokens
        tokens = {
            "input_ids": np.tile(np.arange(new_tokens, dtype=np.int64) % 64 + 3, (batch, 1)),
            "attention_mask": np.ones((batch, total), dtype=np.int64),
            "position_ids": np.tile(np.arange(past_tokens, total, dtype=np.int64), (batch, 1)),
        }
        binding = self._session.io_binding()
        for item in self._session.get_inputs():
            name = item.name
            if name in tokens:
                value = OrtValue.ortvalue_from_numpy(tokens[name], self._device, 0)
                self._held.append(value)
                binding.bind_ortvalue_input(name, value)
                continue
            if not name.startswith("past_key_values."):
                raise ValueError(f"the graph has an input '{name}' that is not known")
            heads = item.shape[1]
            past = self._cache(item.type, (batch, heads, self._capacity or past_tokens, self._head_dim))
            present = past if self._capacity else self._cache(item.type, (batch, heads, total, self._head_dim))
            self._held += [past, present]
            binding.bind_ortvalue_input(name, past)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), present)
        binding.bind_output("logits", self._device)
        return binding

    def _cache(self, element_type: str, shape: tuple[int, ...]) -> Any:
        """A KV buffer with ordinary numbers in it: uninitialised memory may hold denormals, which run slowly."""
        import numpy as np
        from onnxruntime import OrtValue

        values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * 0.1
        if element_type == "tensor(bfloat16)":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
            return OrtValue.ortvalue_from_numpy_with_onnx_type(values, ELEMENT_TYPES[element_type])
        if element_type == "tensor(float16)":
            values = values.astype(np.float16)
        return OrtValue.ortvalue_from_numpy(values, self._device, 0)
