"""What a precision costs in quality: the full model, written in it, on a text. Measured once and kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from amoeba_export.application.rounded import can_use_data, with_rounding
from amoeba_export.application.session import Session
from amoeba_export.artifact import sha256_file
from amoeba_export.backends.targets import graph_options
from amoeba_export.cache.kinds import ROUNDING
from amoeba_export.evaluate.perplexity import read_windows
from amoeba_export.formats.write import write_formats
from amoeba_export.ir import RoundingHow
from amoeba_export.locations import data_dir
from amoeba_export.materialize import materialize_subnet
from amoeba_export.model.samples import MOST_WINDOWS, WINDOW, few_windows
from amoeba_export.model.tokenizer import has_tokenizer, open_tokenizer
from amoeba_export.verify import check_numbers, masked_logits
from amoeba_export.verify.reload import OPENERS

FIGURES_NAME = "figures.json"

TEXT = "wikitext2/wikitext2.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What one precision makes of the full model.

    Attributes:
        rise: Of the loss by rounding, in nats per token; never negative. Without a tokenizer, the mean KL divergence
            of the logits stands for it.
        loss: Of the full model unrounded, on the text that `rise` was measured on; None without a tokenizer.
        how: Whether integers were chosen with data, where the precision has integers that could be; else None.
    """

    rise: float
    loss: float | None
    how: RoundingHow | None = None


def measure_rounding(session: Session, *, with_data: bool = True) -> Rounding:
    """What rounding to the session's dtype costs the full model, from the cache or measured now. fp32 costs nothing.

    Args:
        session: With a dtype.
        with_data: Choose integers with data where an export would. That takes longer than all else here; to nearest is
            at once, and costs more quality.

    Raises:
        NumbersDiffer: It is beyond what is accepted of an artifact.
    """
    session = session.with_supernet(session.supernet.with_head_tokens(None))  # a smaller head is rounded no otherwise
    loss = None
    if has_tokenizer(session.supernet.text_folder):
        loss = _kept(session, None, lambda: _unrounded_loss(session, _windows(session)))
    if session.dtype == "fp32":
        return Rounding(rise=0.0, loss=loss)
    how: RoundingHow | None = "nearest" if can_use_data(session) else None
    if with_data:
        session = with_rounding(session, session.supernet.full_plan())
        how = "data" if session.rounded is not None else how
    rise = _kept(session, session.dtype, lambda: _rise(session, loss))
    return Rounding(rise=max(0.0, rise), loss=loss, how=how)


def _kept(session: Session, dtype: str | None, measure: Callable[[], float]) -> float:
    """A figure from the cache, or measured now and put there."""
    facts = {
        "model": session.supernet.identity,
        "adapters": [item.sha256 for item in session.supernet.inputs if item.role == "adapter"],
        "text": [sha256_file(data_dir("calibration") / TEXT), WINDOW, MOST_WINDOWS],
        "format": session.settings.formats[0] if dtype else None,
        "dtype": dtype,
        "rounded": session.rounded.identity if dtype and session.rounded else None,
        "options": _options(session) if dtype else {},
    }
    known = session.cache.get_json(ROUNDING, facts, FIGURES_NAME, progress=session.progress)
    if known is None:
        known = {"value": measure()}
        session.cache.put_json(ROUNDING, facts, FIGURES_NAME, known)
    return float(known["value"])


def _rise(session: Session, loss: float | None) -> float:
    supernet, dtype, container = session.supernet, session.dtype, session.settings.formats[0]
    plan = session.supernet.full_plan()
    session.progress.note(f"Measuring the full model's loss from rounding to {dtype}, once.")
    with tempfile.TemporaryDirectory(prefix="amoeba-") as scratch:
        folder = Path(scratch)
        subnet = materialize_subnet(supernet, plan)
        options = _options(session)
        if session.rounded is not None and session.rounded.format == container:
            options = {container: {**options.get(container, {}), "rounded": session.rounded.tensors}}
        write_formats(subnet, folder, {container: dtype}, options=options, progress=session.progress)
        opened = OPENERS[container](folder / container)
        distance = check_numbers(opened, folder / container, supernet, plan)
        if loss is None:
            return distance.mean_kl
        windows = _windows(session)
        return _loss(windows, [opened.logits(torch.tensor([window])) for window in windows]) - loss


def _options(session: Session) -> dict[str, dict[str, Any]]:
    """How the container is spelled for the target."""
    container = session.settings.formats[0]
    return {"onnx": graph_options(session.target, session.dtype)} if container == "onnx" else {}


def _unrounded_loss(session: Session, windows: Sequence[Sequence[int]]) -> float:
    logits_BTV = masked_logits(session.supernet, session.supernet.full_plan(), torch.tensor(windows))
    return _loss(windows, [logits_TV[None] for logits_TV in logits_BTV])


def _loss(windows: Sequence[Sequence[int]], logits: Sequence[torch.Tensor]) -> float:
    """Mean over every token of every window but the first. Logits are [1, T, V] of each window."""
    losses = [
        torch.nn.functional.cross_entropy(logits_BTV[0, :-1].float(), torch.tensor(window[1:]))
        for window, logits_BTV in zip(windows, logits, strict=True)
    ]
    return float(torch.stack(losses).mean())


def _windows(session: Session) -> list[list[int]]:
    """Of the text, in the model's tokens."""
    return _read_windows(session.supernet.text_folder, *few_windows(session.architecture))


@lru_cache(maxsize=1)
def _read_windows(folder: Path, window: int, limit: int) -> list[list[int]]:
    """Those of the last model are kept: each of its precisions asks for them, and the whole text takes seconds."""
    return read_windows(data_dir("calibration") / TEXT, open_tokenizer(folder), window=window, limit=limit)
