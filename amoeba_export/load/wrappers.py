"""The text model inside one that also sees or hears: its config, and which of the weights are its own.

`wrappers.toml` lists the models of which this is known. They name a weight `language_model.model.layers...`,
`model.language_model.layers...`, `model.text_model.layers...`, or as the text model alone does.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from amoeba_export.errors import InputError
from amoeba_export.ir import Family
from amoeba_export.load.families import unsupported
from amoeba_export.load.family_file import supported_families

TEXT_STEPS = ("language_model", "text_model")
"""Steps of a weight's path that lead to the text model."""


def is_wrapper(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a model whose text model is taken."""
    return config.get("model_type") in _known()["models"] or "text_config" in config


def text_config(config: Mapping[str, Any], *, where: Path) -> dict[str, Any]:
    """The config of the text model, with transformers' defaults spelled out: wrappers leave most of it to them.

    Whether its embeddings are tied is up to the weights: wrappers say it twice, and not always alike.

    Raises:
        UnsupportedError: It is not known that the text model computes by itself what a family of ours does.
        InputError: transformers cannot read the config.
    """
    from amoeba_export.model.opening import config_of

    known = _known()
    if config.get("model_type") not in known["models"]:
        raise unsupported(config, (*supported_families(), *known["models"]), where=where)
    try:
        text: dict[str, Any] = config_of(config).get_text_config().to_dict()
    except Exception as error:  # whatever its checks of a config raise: they come from several packages
        raise InputError(
            f"transformers refuses the config of the model: {error}",
            where=where,
            next_step="Get config.json again from where the weights come from.",
        ) from error
    found = text["model_type"]
    return text | {"model_type": known["families"].get(found, found)}


def text_name(name: str, family: Family) -> str | None:
    """What the text model calls a weight of the whole; None where it is none of its own."""
    steps = name.split(".")
    for step in TEXT_STEPS:
        if step in steps[:2]:
            steps.remove(step)
            return ".".join(steps)
    is_own = family.find(name) is not None or name.startswith(family.layers_prefix)
    return name if is_own else None


@functools.cache
def _known() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
