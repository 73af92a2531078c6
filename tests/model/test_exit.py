"""What a writer behind a norm aims at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amoeba_export.ir import Architecture
from amoeba_export.load import load_supernet
from amoeba_export.model.layer import Exit, Norm
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder: Path = save_tiny(tmp_path_factory.mktemp("model"))
    return load_supernet(str(folder)).architecture


def test_a_step_towards_what_is_wanted_comes_nearer(architecture: Architecture) -> None:
    """A target that is met asks for no change. A channel that the norm nearly mutes stays as it is."""
    generator = torch.Generator().manual_seed(0)
    gain_D = 0.5 + torch.rand(64, generator=generator)
    gain_D[7] = 1e-4
    leaving = Exit(norm=Norm(gain_D - architecture.norm_offset, architecture), scale=0.5)
    written_TD = 3 * torch.randn(40, 64, generator=generator)
    now_TD = leaving.added(written_TD)
    torch.testing.assert_close(leaving.aim(now_TD, written_TD), written_TD)
    wanted_TD = now_TD + 0.05 * torch.randn(40, 64, generator=generator)
    aim_TD = leaving.aim(wanted_TD, written_TD)
    assert (leaving.added(aim_TD) - wanted_TD).norm() < 0.3 * (now_TD - wanted_TD).norm()
    assert (aim_TD - written_TD)[:, 7].abs().max() < 0.01


def test_without_a_norm_it_is_what_is_wanted(architecture: Architecture) -> None:
    wanted_TD = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Exit(norm=None, scale=0.5).aim(wanted_TD, wanted_TD), 2 * wanted_TD)
