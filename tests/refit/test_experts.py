"""A mixture of experts: attention answers for what is cut, and experts stay as they were."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from amoeba_export.materialize import materialize_subnet
from amoeba_export.refit import RefitRecipe
from amoeba_export.verify import masked_logits, verify_artifact
from tests.families.configs import save_family
from tests.materialize.subnets import open_supernet, plan_for, write
from tests.model.models import save_tokenizer
from tests.refit.models import IDS, fitted


@pytest.mark.parametrize("shape", ["4x0.5", "3x1", "3x0.6"])
def test_a_refit_answers_in_attention_for_what_is_cut(shape: str, recipe: RefitRecipe, tmp_path: Path) -> None:
    """It has o_proj of every kept layer; experts stay as they were. The files hold it, and it comes closer."""
    save_tokenizer(save_family(tmp_path / "model", "qwen3_moe"))
    supernet = open_supernet(tmp_path / "model")
    plan = dataclasses.replace(plan_for(supernet, shape), model_id=supernet.identity)
    held, (named,) = fitted(supernet, [plan], recipe, tmp_path / "refit")
    refit = held.refits[named.refit_id or ""]
    fitted_modules = {supernet.family.module("o", position) for position in range(len(plan.layers))}
    names = {
        name for name in dict(materialize_subnet(supernet, plan).stream()) if name.rpartition(".")[0] in fitted_modules
    }
    assert set(refit.tensors.names()) == names
    weights = dict(materialize_subnet(held, named).stream())
    before = dict(materialize_subnet(supernet, plan).stream())
    for name, weight in weights.items():
        expected = refit.tensors.read(name) if name in names else before[name]
        assert torch.equal(weight.float(), expected.float()), name
    write(materialize_subnet(held, named), tmp_path / "out" / "safetensors", "safetensors", "fp32")
    assert verify_artifact(tmp_path / "out", held, named).greedy_tokens_equal
    full, cut, better = (
        masked_logits(one, of, IDS) for one, of in ((supernet, supernet.full_plan()), (supernet, plan), (held, named))
    )
    assert (better - full).norm() < (cut - full).norm()
