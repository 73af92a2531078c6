"""A GGUF file as an ordinary model folder in fp32.

    file --metadata.py--> keys that change the function     --tensors.py--> config, and weights under our names
         --tokenizer.py--> tokenizer.json                    --compare.py--> what llama.cpp says to all of it

transformers reads GGUF too (`gguf_file=`); it drops RoPE scaling, biases and splitting rules without a word. Here
what is in the file is consumed or refused.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from amoeba_export.gguf_file import open_gguf
from amoeba_export.ir import SILENT, Progress
from amoeba_export.load.gguf.compare import compare_with_llama_cpp
from amoeba_export.load.gguf.metadata import read_metadata
from amoeba_export.load.gguf.tensors import Model, read_model, read_weights
from amoeba_export.load.gguf.tokenizer import Vocabulary, read_vocabulary, save_tokenizer
from amoeba_export.load.gguf.weights_file import write_weights
from amoeba_export.load.stored import as_in_files, shapes_in_files

_CONFIG_TOKENS = ("bos", "eos", "pad", "unk")


def convert_gguf(path: Path, out: Path, *, progress: Progress = SILENT) -> None:
    """Write the model in `path` into the folder `out`, and compare it with llama.cpp where that is installed.

    Raises:
        NotFound: A part of a split file is missing.
        DamagedFile: It is no sound GGUF file, or its parts do not fit together.
        UnsupportedError: Something in it that changes the function and that we do not compute, by name.
        GgufDisagrees: llama.cpp computes something else from the file.
    """
    file = open_gguf(path)
    metadata = read_metadata(file)
    model = read_model(file, metadata)
    vocabulary = read_vocabulary(file)
    if model.is_padded:
        size = model.size
        progress.note(
            f"The layers of {path.name} are filled up with zeros to {size.num_heads} query heads, "
            f"{size.num_kv_heads} KV heads and {size.ffn_size} neurons each: a source has layers that are alike"
        )
    _save_config(model, vocabulary, out)
    weights = as_in_files(read_weights(model), model.family, model.architecture)
    write_weights(out / "model.safetensors", shapes_in_files(model.family, model.architecture), weights)
    if vocabulary is not None:
        save_tokenizer(vocabulary, out, max_positions=metadata.max_positions)
    compare_with_llama_cpp(path, out, model, vocabulary, progress=progress)


def _save_config(model: Model, vocabulary: Vocabulary | None, out: Path) -> None:
    """`config.json` with every default of the stock type spelled out, and `generation_config.json`."""
    from transformers import AutoConfig, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    special = vocabulary.special if vocabulary is not None else {}
    values = dict(model.config)
    model_type = values.pop("model_type")
    tokens: dict[str, Any] = {f"{name}_token_id": special.get(name) for name in _CONFIG_TOKENS}
    if tokens["unk_token_id"] is None:
        del tokens["unk_token_id"]
    with _quiet():
        config = AutoConfig.for_model(model_type, **values, **tokens, use_cache=True)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
        config.dtype = torch.float32
        config.save_pretrained(out)
        GenerationConfig.from_model_config(config).save_pretrained(out)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers remarks on stderr that it was given keys; there is nobody to read it."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
