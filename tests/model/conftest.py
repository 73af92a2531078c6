from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amoeba_export.ir import Supernet
from tests.model.models import tiny_supernet


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Supernet:
    """GQA 6/3, six layers."""
    return tiny_supernet(tmp_path_factory.mktemp("calibrate") / "llama", num_hidden_layers=6)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    from tests.model.models import random_text

    path = tmp_path / "text.txt"
    path.write_text(random_text(2000), encoding="utf-8")
    return path
