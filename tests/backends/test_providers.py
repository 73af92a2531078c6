"""A provider of ONNX Runtime is one that computes, not one that is listed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from amoeba_export.backends.runner import engine_onnxruntime
from amoeba_export.backends.runner.engines import Unavailable

CUDA = "CUDAExecutionProvider"


def runtime(used: str, error: str | None = None) -> Any:
    """An onnxruntime whose sessions run on `used`, or fail."""

    class Session:
        def __init__(self, model: bytes, settings: object, *, providers: list[str]) -> None:
            assert providers == [CUDA]

        def get_providers(self) -> list[str]:
            return [used]

        def run(self, outputs: None, feeds: dict[str, Any]) -> list[Any]:
            if error:
                raise RuntimeError(error)
            return [feeds["x"] * 2]

    return SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=Session)


def test_the_model_that_is_tried_adds() -> None:
    session = onnxruntime.InferenceSession(engine_onnxruntime._ADD, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": np.array([3.0], np.float32)})[0], [6.0])


def test_one_that_computes_is_taken() -> None:
    engine_onnxruntime.prove(runtime(CUDA), CUDA)


def test_one_that_another_steps_in_for_is_not() -> None:
    with pytest.raises(Unavailable, match=f"lists {CUDA} and runs on CPUExecutionProvider in its place") as caught:
        engine_onnxruntime.prove(runtime("CPUExecutionProvider"), CUDA)
    assert caught.value.next_step.startswith("Install the libraries that it needs")


def test_one_without_kernels_for_the_gpu_says_what_to_build() -> None:
    error = "CUDA failure 209: no kernel image is available for execution on the device ; GPU=0"
    with pytest.raises(Unavailable, match="an inference on it fails") as caught:
        engine_onnxruntime.prove(runtime(CUDA, error), CUDA)
    assert "build it for the architecture of the device (87 is Orin" in caught.value.next_step
