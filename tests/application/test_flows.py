"""A board that nobody has at hand: its flow's format first, an estimate called one, and a file that llama.cpp runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amoeba_export import ExportRequest, export
from amoeba_export.backends.targets import read_target
from amoeba_export.verify import masked_logits
from amoeba_export.verify.gguf_file import OpenedGguf
from tests.formats.bpe import save_bpe
from tests.search.strategies import write_graded
from tests.tiny import save_tiny

PROMPT = torch.arange(3, 15)[None]


def test_a_cut_for_jetson_is_a_gguf_that_llama_cpp_decodes_as_the_masked_supernet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model")
    save_bpe(model)
    request = ExportRequest(
        model=str(model),
        target="jetson",
        strategy=write_graded(model, tmp_path / "strategy.safetensors"),
        latency="80%",
        dtype="fp16",
        refit="off",
        out=tmp_path / "out",
    )
    result = export(request)
    assert read_target("jetson").name == "jetson-orin-nano-llamacpp"
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["gguf", "safetensors"]
    latency = result.manifest.latency
    assert latency is not None
    assert latency.source == "analytic"
    assert latency.measured_ms is None
    assert latency.predicted_ms is not None
    assert latency.budget_ms is not None
    assert latency.predicted_ms <= latency.budget_ms
    assert len(result.plan.layers) < 4
    tokens = OpenedGguf(tmp_path / "out" / "gguf").continued(PROMPT, 6).tokens
    expected: list[int] = []
    for _ in tokens:
        sequence = torch.cat([PROMPT, torch.tensor([expected], dtype=torch.long)], dim=1)
        expected.append(int(masked_logits(result.supernet, result.plan, sequence)[0, -1].argmax()))
    assert list(tokens) == expected
