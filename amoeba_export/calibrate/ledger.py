"""Every score that was ever computed, on disk as soon as it is known: what is here is never computed again."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from amoeba_export.cache.sealed import sealed_line, unsealed_line
from amoeba_export.calibrate.evaluator import KeptLayers, Scorer
from amoeba_export.ir import SILENT, Progress
from amoeba_export.model.samples import Samples
from amoeba_export.replacing import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Ledger:
    """Scores of cuts, chunk by chunk; a chunk is some consecutive batches, scored at once.

    The file has one sealed JSON line per cut and chunk, appended and synced after each call of the scorer. A line that
    a killed process left unfinished, or that is not what was written, is dropped.

    Args:
        scorer: Computes what is not there.
        chunks: Ranges of batches, from the first batch to the last.
        path: The file, or None to keep scores in memory only.
        progress: Told of damage.
    """

    def __init__(
        self, scorer: Scorer, chunks: Sequence[range], path: Path | None = None, *, progress: Progress = SILENT
    ) -> None:
        self.chunks = tuple(chunks)
        self._scorer = scorer
        self._known: dict[tuple[str, int, int], NDArray[np.float64]] = {}
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._load(path, progress)
            self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def chunk(self, cuts: Iterable[KeptLayers], chunk_idx: int) -> dict[KeptLayers, NDArray[np.float64]]:
        """The scores of each cut in one chunk."""
        wanted = list(dict.fromkeys(cuts))
        batches = self.chunks[chunk_idx]
        missing = [cut for cut in wanted if self._key(cut, batches) not in self._known]
        if missing:
            scores = self._scorer.scores(missing, batches)
            self._keep([(self._key(cut, batches), values) for cut, values in zip(missing, scores, strict=True)])
        return {cut: self._known[self._key(cut, batches)] for cut in wanted}

    def all(self, cuts: Sequence[KeptLayers]) -> list[NDArray[np.float64]]:
        """The scores of each cut over all samples."""
        parts = [self.chunk(cuts, chunk_idx) for chunk_idx in range(len(self.chunks))]
        return [np.concatenate([part[cut] for part in parts]) for cut in cuts]

    def _key(self, cut: KeptLayers, batches: range) -> tuple[str, int, int]:
        return str(cut), batches.start, batches.stop

    def _keep(self, entries: Sequence[tuple[tuple[str, int, int], NDArray[np.float64]]]) -> None:
        self._known.update(entries)
        if self._file is None:
            return
        lines = (json.dumps({"cut": cut, "batches": [start, stop], "scores": list(values)})
                 for (cut, start, stop), values in entries)  # fmt: skip
        self._file.write("".join(f"{sealed_line(line)}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _load(self, path: Path, progress: Progress) -> None:
        """Take the sound lines, and leave only these in the file."""
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        *whole, unfinished = lines
        sound = []
        for line in whole:
            text = unsealed_line(line.decode("utf-8", "replace"))
            if text is None:
                continue
            sound.append(line)
            entry = json.loads(text)
            start, stop = entry["batches"]
            self._known[entry["cut"], start, stop] = np.array(entry["scores"], dtype=np.float64)
        if len(sound) < len(whole):
            progress.note(f"{len(whole) - len(sound)} lines of {path} are damaged; these scores are computed again.")
        if len(sound) < len(whole) or unfinished:
            with replacing(path) as part:
                part.write_bytes(b"".join(line + b"\n" for line in sound))


def one_by_one(samples: Samples) -> list[range]:
    """A chunk per batch."""
    return [range(i, i + 1) for i in range(len(samples.batches))]


def all_at_once(samples: Samples) -> list[range]:
    """One chunk."""
    return [range(len(samples.batches))]


def doubling(samples: Samples) -> list[range]:
    """Chunks of 1, 1, 2, 4, ... batches: each doubles what has been seen."""
    num_batches = len(samples.batches)
    ends = [0, 1]
    while ends[-1] < num_batches:
        ends.append(min(2 * ends[-1], num_batches))
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]
