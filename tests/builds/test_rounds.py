"""Who works beside whom. Exports here are functions that cut a tiny model and then wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from amoeba_export.application.assemble import Cutter
from amoeba_export.builds import rounds
from amoeba_export.builds.rounds import Export, Rounds
from amoeba_export.formats.write import WriteJob
from amoeba_export.ir import SILENT
from amoeba_export.materialize import materialize_subnet
from tests.materialize.subnets import open_supernet, plan_for

PATIENCE_S = 600.0
"""How long somebody waits who will be met."""

SOON_S = 0.2
"""How long somebody waits who should not be met."""


class Meeting:
    """Counts who is in it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self.most = 0

    def hold(self, *, until: Callable[[], bool], seconds: float) -> None:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        wait = threading.Event()
        for _ in range(int(seconds / 0.01)):
            if until():
                break
            wait.wait(0.01)
        with self._lock:
            self._inside -= 1


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


Exports = Callable[..., list[Export[int]]]


@pytest.fixture
def exports(tiny_dirs: dict[str, Path], tmp_path: Path) -> Exports:
    """Exports that are in `before`, cut a model, and are in `after`; each returns its number of torch threads there."""

    def make(num: int, *, measures: bool, before: Meeting, after: Meeting, meets: int) -> list[Export[int]]:
        supernet = open_supernet(tiny_dirs["llama"])

        def export_to(folder: Path) -> Export[int]:
            def run(cutter: Cutter) -> int:
                before.hold(until=lambda: before.most > 1, seconds=SOON_S)
                subnet = materialize_subnet(supernet, plan_for(supernet, "3x0.6"))
                folder.mkdir()
                cutter(supernet, WriteJob(subnet=subnet, folder=folder, dtypes={"safetensors": "fp32"}), SILENT)
                assert (folder / "safetensors" / "model.safetensors").is_file()
                after.hold(until=lambda: after.most > 1, seconds=PATIENCE_S if meets > 1 else SOON_S)
                return torch.get_num_threads()

            return Export(run, measures=measures)

        return [export_to(tmp_path / str(i)) for i in range(num)]

    return make


def results_of(lanes: int, wanted: list[Export[int]]) -> list[int]:
    found: dict[int, int] = {}
    Rounds(lanes=lanes, progress=SILENT).run(wanted, done=found.__setitem__)
    return [found[position] for position in range(len(wanted))]


@pytest.mark.usefixtures("torch_threads")
def test_after_the_cut_lanes_work_at_once_and_share_the_threads(exports: Exports) -> None:
    before, after = Meeting(), Meeting()
    assert results_of(2, exports(3, measures=False, before=before, after=after, meets=2)) == [2, 2, 2]
    assert (before.most, after.most) == (1, 2)
    assert torch.get_num_threads() == 4
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]


@pytest.mark.usefixtures("torch_threads")
def test_who_measures_is_alone_with_every_thread(exports: Exports) -> None:
    before, after = Meeting(), Meeting()
    assert results_of(2, exports(3, measures=True, before=before, after=after, meets=1)) == [4, 4, 4]
    assert (before.most, after.most) == (1, 1)


@pytest.mark.usefixtures("torch_threads")
def test_large_subnets_are_alone(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "LARGE_PARAMS", 1000)
    before, after = Meeting(), Meeting()
    assert results_of(2, exports(2, measures=False, before=before, after=after, meets=1)) == [4, 4]
    assert after.most == 1
