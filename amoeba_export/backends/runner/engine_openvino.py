"""OpenVINO: the ONNX graph made stateful, as OpenVINO GenAI runs it, so that the KV cache stays inside the runtime."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from .device import physical_cores
from .engines import Unavailable


def describe(options: Mapping[str, Any]) -> dict[str, str]:
    """Version, device and threads. Raises `Unavailable` when the wheel or the device is not there."""
    _report_nothing()
    try:
        import openvino
    except ImportError as error:
        raise Unavailable(
            f"openvino cannot be imported ({error})", "Install it: pip install 'amoeba-export[openvino]'."
        ) from None
    devices = openvino.Core().available_devices
    if options["device"].split(".")[0] not in {device.split(".")[0] for device in devices}:
        raise Unavailable(
            f"OpenVINO sees no {options['device']} here, only {', '.join(devices) or 'nothing'}",
            "Choose another device in the target's options, or install its driver.",
        )
    return {
        "runtime": f"openvino {openvino.__version__}",
        "provider": options["device"],
        "threads": str(options["threads"] or physical_cores()),
        "precision": options["precision"],
    }


def in_main_memory(options: Mapping[str, Any]) -> bool:
    """See `engines.load_engine`."""
    return bool(options["device"] == "CPU")


def open_model(subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> _Model:
    """Open `model` in `folder`: an ONNX graph with `past_key_values.*` inputs and `present.*` outputs."""
    return _Model(subject, workload, options)


def _report_nothing() -> None:
    """OpenVINO reports its import to its makers unless that package is missing; no variable switches it off."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class _Model:
    def __init__(self, subject: Mapping[str, Any], workload: Mapping[str, int], options: Mapping[str, Any]) -> None:
        _report_nothing()
        import numpy as np
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        core = openvino.Core()
        model = core.read_model(os.path.join(subject["folder"], subject["model"]))  # noqa: PTH118 - startup counts
        names = {name for port in model.inputs for name in port.get_names()}
        pasts = sorted(name for name in names if name.startswith("past_key_values."))
        batch, prompt = workload["batch"], workload["prompt_tokens"]
        shapes = {}
        for port in model.inputs:
            shape = port.get_partial_shape()
            shape[0] = batch
            shapes[port] = shape
        model.reshape(shapes)
        apply_make_stateful_transformation(
            model, {name: name.replace("past_key_values.", "present.") for name in pasts}
        )
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": options["threads"] or physical_cores(),
            "INFERENCE_PRECISION_HINT": options["precision"],
            **options["properties"],
        }
        if options["device"] != "CPU":
            del settings["INFERENCE_NUM_THREADS"]
        self._request = core.compile_model(model, options["device"], settings).create_infer_request()

        def feed(past: int, new: int) -> dict[str, Any]:
            tokens = {
                "input_ids": np.tile(np.arange(new, dtype=np.int64) % 64 + 3, (batch, 1)),
                "attention_mask": np.ones((batch, past + new), dtype=np.int64),
                "position_ids": np.tile(np.arange(past, past + new, dtype=np.int64), (batch, 1)),
            }
            return {name: value for name, value in tokens.items() if name in names}

        self._prompt, self._token = feed(0, prompt), feed(prompt, 1)
        self.prefill()
        self._after_prompt = [
            (state, openvino.Tensor(state.state.data.copy())) for state in self._request.query_state()
        ]

    def rewind(self) -> None:
        """Put the cache back to what it is after the prompt."""
        for state, value in self._after_prompt:
            state.state = value

    def decode(self) -> None:
        """One token after the prompt."""
        self._request.infer(self._token, share_inputs=True, share_outputs=True)

    def prefill(self) -> None:
        """The whole prompt, from an empty cache."""
        self._request.reset_state()
        self._request.infer(self._prompt, share_inputs=True, share_outputs=True)

    def close(self) -> None:
        """Free the compiled model."""
        del self._request, self._after_prompt
