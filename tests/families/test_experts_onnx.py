"""Experts in ONNX: the loop over those that a call picked. With and without a cache: `test_containers.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from amoeba_export.formats.onnx import write_random
from amoeba_export.ir import Supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits
from tests.families.configs import save_family
from tests.materialize.subnets import open_supernet, write

DIALECTS = ("ort", "standard")


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Supernet:
    return open_supernet(save_family(tmp_path_factory.mktemp("experts"), "qwen3_moe"))


def run(path: Path, rows: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """Logits after an empty cache."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    feeds = {one.name: np.zeros((len(rows), one.shape[1], 0, one.shape[3]), np.float32) for one in pasts}
    feeds |= {"input_ids": np.array(rows, np.int64), "attention_mask": np.array(mask, np.int64)}
    logits: np.ndarray[Any, Any] = session.run(["logits"], feeds)[0]
    return logits


@pytest.mark.parametrize("dialect", DIALECTS)
def test_rows_of_a_batch_pick_experts_of_their_own(supernet: Supernet, dialect: str, tmp_path: Path) -> None:
    """Padding picks some, too, and changes nothing."""
    plan = supernet.full_plan()
    folder = write(materialize_subnet(supernet, plan), tmp_path / "onnx", "onnx", "fp32", dialect=dialect)
    rows = [[5, 9, 17, 33, 40], [0, 0, 21, 3, 7]]
    found = run(folder / "model.onnx", rows, [[1] * 5, [0, 0, 1, 1, 1]])
    for i, start in enumerate((0, 2)):
        expected = masked_logits(supernet, plan, torch.tensor([rows[i][start:]]))[0].numpy()
        assert np.abs(found[i, start:] - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_graph_holds_each_matrix_once_and_a_loop_for_each_layer(
    supernet: Supernet, dialect: str, tmp_path: Path
) -> None:
    """One body takes the matrices of one expert, by its index, out of what the graph stores."""
    write_random(supernet.architecture.uncut, tmp_path, dtype="fp32", dialect=dialect)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    assert len(loops) == 4
    body = loops[0].attribute[0].g
    assert not body.initializer
    assert [node.op_type for node in body.node].count("Gemm") == 3
    shapes = {one.name: list(one.dims) for one in model.graph.initializer}
    names = {role: supernet.family.weight(role, 0) for role in ("router", "gate", "down")}  # type: ignore[arg-type]
    assert {role: shapes[name] for role, name in names.items()} == {
        "router": [6, 64],
        "gate": [6, 24, 64],
        "down": [6, 64, 24],
    }
    assert np.isfinite(run(tmp_path / "model.onnx", [[1, 2, 3]], [[1] * 3])).all()
