"""How the tools that people have run a file of ours. Called by `compat.py`.

Each consumer by its own interpreter:

    PYTHON consumers.py NAME FOLDER PROMPT_IDS NUM_TOKENS

Prints one line of JSON, `{"version": ..., "tokens": [...]}`. Imports nothing of amoeba: it is not installed there.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def transformers(folder: Path, prompt: list[int], num_tokens: int) -> tuple[str, list[int]]:
    """Stock types as they are; code beside the weights only where the config names it."""
    import torch
    from transformers import AutoModelForCausalLM

    needs_code = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=needs_code)
    return f"transformers {version('transformers')}", _generate(model, prompt, num_tokens)


def optimum_onnx(folder: Path, prompt: list[int], num_tokens: int) -> tuple[str, list[int]]:
    """`ORTModelForCausalLM`, as its own documentation loads a model."""
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder)
    return f"optimum-onnx {version('optimum-onnx')}", _generate(model, prompt, num_tokens)


def _generate(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
    )
    return found[0, len(prompt) :].tolist()


def onnxruntime(folder: Path, prompt: list[int], num_tokens: int) -> tuple[str, list[int]]:
    """A plain session: prefill, then one token at a time with the outputs fed back."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    shapes = {item.name: item.shape for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]

    def step(feeds: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, session.run(None, feeds), strict=True))

    return f"onnxruntime {version('onnxruntime')}", _decode(step, shapes, prompt, num_tokens)


def openvino(folder: Path, prompt: list[int], num_tokens: int) -> tuple[str, list[int]]:
    """The same, on OpenVINO's CPU plugin in fp32."""
    import openvino as ov

    model = ov.Core().compile_model(str(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shapes = {
        item.any_name: [size.get_length() if size.is_static else -1 for size in item.partial_shape]
        for item in model.inputs
    }

    def step(feeds: dict[str, Any]) -> dict[str, Any]:
        return {name: value for key, value in model(feeds).items() for name in key.names}

    return f"openvino {version('openvino')}", _decode(step, shapes, prompt, num_tokens)


def _decode(
    step: Callable[[dict[str, Any]], dict[str, Any]], shapes: dict[str, Any], prompt: list[int], num_tokens: int
) -> list[int]:
    import numpy as np

    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }
    tokens: list[int] = []
    feed, seen = prompt, 0
    for _ in range(num_tokens):
        stop = seen + len(feed)
        feeds = {
            "input_ids": np.array([feed], np.int64),
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(seen, stop, dtype=np.int64)[None],
        }
        results = step({name: value for name, value in feeds.items() if name in shapes} | past)
        past = {name: np.array(results[name.replace("past_key_values", "present")]) for name in past}
        tokens.append(int(np.array(results["logits"])[0, -1].argmax()))
        feed, seen = [tokens[-1]], stop
    return tokens


def onnxruntime_genai(folder: Path, prompt: list[int], num_tokens: int) -> tuple[str, list[int]]:
    """The runtime of ONNX Runtime GenAI, from `genai_config.json`."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + num_tokens, repetition_penalty=1.0)
    generator = genai.Generator(model, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    return f"onnxruntime-genai {version('onnxruntime-genai')}", tokens


def llama_cpp(folder: Path, prompt: list[int], num_tokens: int) -> tuple[str, list[int]]:
    """llama.cpp in the xllamacpp wheel, with its cache in fp32."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / "model.gguf")
    settings.n_ctx = len(prompt) + num_tokens + 8
    settings.n_parallel = 1
    settings.verbosity = -1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        json.dumps({"prompt": prompt, "n_predict": num_tokens, "temperature": -1.0, "return_tokens": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        tokens = [int(token) for token in json.load(response)["tokens"]]
    return f"xllamacpp {version('xllamacpp')} (llama.cpp)", tokens


CONSUMERS = {
    function.__name__: function
    for function in (transformers, optimum_onnx, onnxruntime, onnxruntime_genai, openvino, llama_cpp)
}

if __name__ == "__main__":
    name, folder, prompt, count = sys.argv[1:]
    found_version, tokens = CONSUMERS[name](Path(folder), json.loads(prompt), int(count))
    print(json.dumps({"version": found_version, "tokens": tokens}))
