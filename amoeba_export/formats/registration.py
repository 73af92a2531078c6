"""Make transformers know `amoeba` models in this process, so that loading one needs no `trust_remote_code`."""

from __future__ import annotations


def register_transformers() -> None:
    """Register `modeling_amoeba.py` with transformers' Auto classes. Calling it again changes nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from amoeba_export.formats.modeling_amoeba import AmoebaConfig, AmoebaForCausalLM

    AutoConfig.register(AmoebaConfig.model_type, AmoebaConfig, exist_ok=True)
    AutoModelForCausalLM.register(AmoebaConfig, AmoebaForCausalLM, exist_ok=True)
