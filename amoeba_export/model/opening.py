"""Transformers objects out of a folder that may be a stranger's: its data is read, its code never runs.

A config can name Python (`auto_map`) or a kernel of the hub; neither is followed. The one class that transformers lacks
is `modeling_amoeba.py` of this package. Depends on transformers alone: it goes to devices with the runner.
"""

from __future__ import annotations

from typing import Any

DATA_ONLY = {"trust_remote_code": False, "local_files_only": True}
"""For everything that transformers reads. Without the first, it asks on the terminal, and runs the code after a `y`."""

_OWN_ATTENTION = (None, "eager", "sdpa")
"""What transformers computes itself; other names stand for packages, or for kernels that it downloads and imports."""


def register_amoeba() -> None:
    """Make transformers know `amoeba` models in this process. Calling it again changes nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from .modeling_amoeba import AmoebaConfig, AmoebaForCausalLM

    AutoConfig.register(AmoebaConfig.model_type, AmoebaConfig, exist_ok=True)
    AutoModelForCausalLM.register(AmoebaConfig, AmoebaForCausalLM, exist_ok=True)


def read_config(folder: Any) -> Any:
    """`config.json` of a folder. Raises what transformers raises: `OSError`, `ValueError`, `KeyError`."""
    from transformers import AutoConfig

    register_amoeba()
    return _plain(AutoConfig.from_pretrained(folder, **DATA_ONLY))


def config_of(values: Any) -> Any:
    """The config that the keys of a `config.json` stand for. Raises whatever its class raises."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def read_model(folder: Any, *, dtype: Any) -> Any:
    """The model of a folder with its weights, which are safetensors. Raises as `read_config`."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True, **DATA_ONLY)


def blank_model(config: Any, **settings: Any) -> Any:
    """The model of a config, with random weights."""
    from transformers import AutoModelForCausalLM

    register_amoeba()
    return AutoModelForCausalLM.from_config(_plain(config), trust_remote_code=False, **settings)


def read_tokenizer(folder: Any) -> Any:
    """The tokenizer of a folder. Raises as `read_config`. Its chat template renders in transformers' sandbox."""
    from transformers import AutoTokenizer

    register_amoeba()
    return AutoTokenizer.from_pretrained(folder, **DATA_ONLY)


def _plain(config: Any) -> Any:
    if config._attn_implementation not in _OWN_ATTENTION:
        config._attn_implementation = None
    return config
