"""The weights of a file at their places in the supernet: read once where they fit in memory, and the same if not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits, scattered
from amoeba_export.verify.expected import ExpectedWeights
from amoeba_export.verify.scattered import with_stored_weights
from amoeba_export.verify.stored import STORED, Stored, StoredWeights
from tests.materialize.subnets import open_supernet, plan_for, write

IDS = torch.arange(3, 15)[None]


class Counting:
    """A file whose reads are counted."""

    def __init__(self, stored: StoredWeights) -> None:
        self._stored, self.sums = stored, stored.sums
        self.reads: Counter[str] = Counter()

    def names(self) -> Collection[str]:
        return self._stored.names()

    def read(self, name: str) -> Stored:
        self.reads[name] += 1
        return self._stored.read(name)


@pytest.mark.parametrize(("room_bytes", "passes"), [(1 << 30, {1}), (0, {2, 4})])
def test_weights_are_read_once_where_there_is_room(
    tiny_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_bytes: int, passes: set[int]
) -> None:
    """In two passes; without room, tied embeddings are read twice in each."""
    monkeypatch.setattr(scattered, "HELD_BYTES", room_bytes)
    supernet = open_supernet(tiny_dirs["llama"])
    plan = plan_for(supernet, "3x0.6")
    folder = write(materialize_subnet(supernet, plan), tmp_path / "out")
    stored = Counting(STORED["safetensors"](folder, ExpectedWeights(supernet, plan).wanted))
    held, held_plan = with_stored_weights(supernet, plan, stored)
    expected = masked_logits(supernet, plan, IDS)
    for _ in range(2):
        found = masked_logits(held, held_plan, IDS)
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert set(stored.reads.values()) <= passes
    assert set(stored.reads) == set(stored.names())
