"""What a precision costs the full model, against the artifact that is written in it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from amoeba_export import ExportRequest, export
from amoeba_export.application import rounding
from amoeba_export.application.resolve import resolve
from amoeba_export.application.session import open_session
from amoeba_export.evaluate import ArtifactModel
from amoeba_export.evaluate.perplexity import measure_perplexity
from amoeba_export.model import samples
from amoeba_export.verify import masked_logits
from amoeba_export.verify.reload import OPENERS
from tests.formats.bpe import save_bpe


def test_the_rise_is_that_of_the_loss_on_the_text(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(samples, "WINDOW", 48)
    model = tmp_path / "model"
    shutil.copytree(tiny_dirs["llama"], model)
    save_bpe(model)
    request = ExportRequest(model=str(model), target="cpu", shape="4x1", dtype="int4", formats=("onnx",))
    session = open_session(resolve(request))
    found = rounding.measure_rounding(session)
    windows = rounding._windows(session)
    assert len(windows) == samples.MOST_WINDOWS
    logits = masked_logits(session.supernet, session.supernet.full_plan(), torch.tensor(windows))
    targets = torch.tensor(windows)[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).item()
    assert found.loss == pytest.approx(loss, abs=1e-5)
    out = tmp_path / "out"
    export(ExportRequest(model=str(model), shape="4x1", dtype="int4", formats=("onnx",), out=out))
    rounded = measure_perplexity(ArtifactModel(OPENERS["onnx"](out / "onnx")), windows)
    assert found.rise == pytest.approx(max(0.0, rounded.loss - loss), abs=1e-5)
    monkeypatch.delattr(rounding, "_windows")
    assert rounding.measure_rounding(session) == found, "from the cache, and the text is not read"
    assert rounding.measure_rounding(session.in_dtype("fp32")) == rounding.Rounding(rise=0.0, loss=found.loss)


def test_without_a_tokenizer_the_divergence_stands_for_it(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))
    request = ExportRequest(model=str(tiny_dirs["llama"]), target="cpu", shape="4x1", formats=("onnx",))
    session = open_session(resolve(request))
    coarse, fine = (rounding.measure_rounding(session.in_dtype(dtype)) for dtype in ("int4", "int8"))
    assert coarse.loss is fine.loss is None
    assert 0 < fine.rise < coarse.rise
    assert math.isfinite(coarse.rise)
