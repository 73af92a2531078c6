"""`genai_config.json`: how the runtime of onnxruntime-genai finds inputs, outputs and end tokens.

The runtime reads the KV heads of each layer from the graph, so layers may differ; it creates one cache per
`num_hidden_layers`, which therefore counts the layers that have attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.formats.onnx.writer import spelled_dialect
from amoeba_export.ir import DenseArchitecture
from amoeba_export.reading import read_json_object

_SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def genai_config(dense: DenseArchitecture, source_folder: Path) -> dict[str, Any]:
    """The content of `genai_config.json`. End tokens and sampling come from the source's `generation_config.json`."""
    base = dense.base
    generation = _generation_config(source_folder)
    tokens = {**base.config, **{key: value for key, value in generation.items() if value is not None}}
    with_attention = [layer for layer in dense.layers if layer.num_heads]
    sampling = {key: default if (given := tokens.get(key)) is None else given for key, default in _SAMPLING.items()}
    return {
        "model": {
            "type": base.containers.get("onnx", {}).get("genai_type", base.family),
            "vocab_size": base.vocab_size,
            "context_length": base.max_positions,
            **_special_tokens(tokens),
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": base.hidden_size,
                "head_size": base.head_dim,
                "num_attention_heads": max((layer.num_heads for layer in with_attention), default=0),
                "num_key_value_heads": max((layer.num_kv_heads for layer in with_attention), default=0),
                "num_hidden_layers": len(with_attention),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **sampling,
            "max_length": base.max_positions,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "early_stopping": True,
            # GroupQueryAttention appends to the cache that it is given; the standard's operators make another one.
            "past_present_share_buffer": spelled_dialect(dense, "ort") == "ort",
        },
    }


def _special_tokens(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime wants numbers: an end token stands in for a padding or start token that the source lacks."""
    end = tokens.get("eos_token_id")
    end = 0 if end is None else end
    first_end = end[0] if isinstance(end, list) else end
    start, padding = tokens.get("bos_token_id"), tokens.get("pad_token_id")
    return {
        "bos_token_id": first_end if start is None else start,
        "eos_token_id": end,
        "pad_token_id": first_end if padding is None else padding,
    }


def _generation_config(source_folder: Path) -> Mapping[str, Any]:
    path = source_folder / "generation_config.json"
    return read_json_object(path, what="The generation config") if path.is_file() else {}
