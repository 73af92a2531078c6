"""The options of `amoeba finetune` are the fields of its settings."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from amoeba_export.cli.finetune import finetune
from amoeba_export.cli.training_options import TOLD, settings_of
from amoeba_export.errors import BadValue
from amoeba_export.finetune.settings import LowRankSettings, ObjectiveSettings, Settings

PARAMETERS = inspect.signature(finetune).parameters
GIVEN = {name: PARAMETERS[name].default for name in TOLD}


def test_every_field_has_an_option() -> None:
    groups = ("low_rank", "objective")
    names = {one.name for kind in (Settings, LowRankSettings, ObjectiveSettings) for one in dataclasses.fields(kind)}
    assert set(TOLD) == names.difference(groups)


def test_options_left_out_are_the_defaults() -> None:
    assert settings_of(GIVEN) == Settings()


def test_options_that_are_given_arrive() -> None:
    settings = settings_of({**GIVEN, "rank": 3, "mask": "unshifted", "targets": "q_proj, v_proj", "depths": "4,3"})
    assert settings == Settings(
        low_rank=LowRankSettings(rank=3, targets=("q_proj", "v_proj")),
        objective=ObjectiveSettings(mask="unshifted"),
        depths=(4, 3),
    )


@pytest.mark.parametrize(
    ("field", "text", "wanted"),
    [
        ("widths", "1,half", "numbers with commas between them"),
        ("depths", "3.5", "whole numbers with commas between them"),
    ],
)
def test_a_list_that_is_none_is_explained(field: str, text: str, wanted: str) -> None:
    with pytest.raises(BadValue) as caught:
        settings_of({**GIVEN, field: text})
    assert (caught.value.what, caught.value.next_step) == (f"--{field} cannot be '{text}'.", f"Give {wanted}.")
