"""The files beside the weights, as readers take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify.sidecars import sidecar_problems
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, write
from tests.tiny import save_tiny


@pytest.mark.parametrize("container", ["safetensors", "onnx"])
def test_a_tokenizer_class_of_transformers_5_gets_the_name_that_all_know(container: str, tmp_path: Path) -> None:
    """ONNX Runtime GenAI before April 2026 refuses the other. The tokens are the same, and verify does not mind."""
    model = save_tiny(tmp_path / "model")
    save_bpe(model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "TokenizersBackend"}))
    supernet = open_supernet(model)
    folder = write(materialize_subnet(supernet, supernet.full_plan()), tmp_path / container, container, "fp32")
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sidecar_problems(folder, supernet) == []
    text = "the cat, hehe"
    theirs, ours = (AutoTokenizer.from_pretrained(one)(text).input_ids for one in (model, folder))
    assert theirs == ours
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    assert sidecar_problems(folder, supernet) == ["tokenizer_config.json is not that of the model"]
