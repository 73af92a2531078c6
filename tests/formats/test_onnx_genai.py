"""The runtime of onnxruntime-genai loads the folder, layers that differ included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.formats.onnx_model import OnnxDecoder, random_weights, subnet_of, write_onnx
from tests.formats.test_onnx_values import adaptive, tokens

genai = pytest.importorskip("onnxruntime_genai")

NEW_TOKENS = 12


def greedy(folder: Path, prompt: torch.Tensor) -> list[int]:
    decoder = OnnxDecoder(folder)
    chosen: list[int] = []
    step = prompt[None]
    for _ in range(NEW_TOKENS):
        chosen.append(int(decoder(step)[0, -1].argmax()))
        step = torch.tensor([chosen[-1:]])
    return chosen


def greedy_by_genai(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(prompts[0])
    parameters.set_search_options(max_length=length + NEW_TOKENS, batch_size=len(prompts), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompts if len(prompts) > 1 else prompts[0])
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(i)[length:]] for i in range(len(prompts))]


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_greedy_tokens_are_those_of_onnxruntime(dtype: str, tmp_path: Path) -> None:
    dense = adaptive()
    folder = write_onnx(subnet_of(dense, random_weights(dense), tmp_path), tmp_path / "onnx", dtype=dtype)
    prompts = tokens(2, 7)
    expected = [greedy(folder, prompt) for prompt in prompts]
    assert len({tuple(row) for row in expected}) == 2
    _never_end(folder, expected)
    assert [greedy_by_genai(folder, [prompt.tolist()])[0] for prompt in prompts] == expected
    assert greedy_by_genai(folder, prompts.tolist()) == expected


@pytest.mark.parametrize("head_dim", [8, 20])
def test_heads_that_onnxruntimes_attention_does_not_take(head_dim: int, tmp_path: Path) -> None:
    dense = adaptive(head_dim=head_dim)
    folder = write_onnx(subnet_of(dense, random_weights(dense), tmp_path), tmp_path / "onnx")
    prompts = tokens(2, 7)
    expected = [greedy(folder, prompt) for prompt in prompts]
    _never_end(folder, expected)
    assert [greedy_by_genai(folder, [prompt.tolist()])[0] for prompt in prompts] == expected


def _never_end(folder: Path, expected: list[list[int]]) -> None:
    """Make a token that does not come up the end token: what is compared are tokens, as many as asked for."""
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = min(set(range(3, 128)) - {token for row in expected for token in row})
    (folder / "genai_config.json").write_text(json.dumps(config))
