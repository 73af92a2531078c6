"""One stream of weights into several containers, and several subnets, at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats import FORMATS
from amoeba_export.ir import SILENT, DenseArchitecture, Progress, Subnet, Writer

if TYPE_CHECKING:
    import torch

THREADS = 2
"""That write several subnets at once. Where the system has to find memory for its cache of the disk first, writing is
slower than computing, and one thread keeps one core busy with it."""

_Accept = Callable[[int, str, "torch.Tensor"], None]


def format_dtypes(
    dense: DenseArchitecture, formats: Sequence[str], dtype: str | None, *, explicit: bool
) -> dict[str, str]:
    """The dtype that each format will be written in, after asking each whether it can hold `dense`.

    A target's default `dtype` is for the format that its backend runs; another format that cannot have it takes its
    own default. A dtype that the user asked for (`explicit`) must be one that at least one format can write.

    Raises:
        NotRepresentable: A format cannot hold the plan, or no format can be written in the dtype asked for.
    """
    able = [name for name in formats if dtype in FORMATS[name].dtypes]
    if explicit and dtype is not None and not able:
        holders = [name for name in FORMATS if dtype in FORMATS[name].dtypes]
        raise NotRepresentable(" and ".join(formats), f"{dtype} is not one of its dtypes", holders)
    dtypes = {name: dtype if dtype and name in able else FORMATS[name].default_dtype for name in formats}
    for name, chosen in dtypes.items():
        try:
            FORMATS[name].check(dense, dtype=chosen)
        except NotRepresentable as error:
            raise _with_good_advice(error, dense) from None
    return dtypes


def _with_good_advice(error: NotRepresentable, dense: DenseArchitecture) -> NotRepresentable:
    """A format knows what it cannot hold, and not what the others cannot."""
    for name, container in FORMATS.items():
        try:
            container.check(dense, dtype=container.default_dtype)
        except NotRepresentable:
            error = error.without(name)
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteJob:
    """A subnet and where it goes.

    Attributes:
        folder: The artifact's folder; it exists. Each format gets a folder in it.
        dtypes: Each format with its dtype, from `format_dtypes`.
        options: Further settings of a format's `open_writer`, such as the dialect of an ONNX graph.
    """

    subnet: Subnet
    folder: Path
    dtypes: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def write_cuts(
    cuts: Sequence[WriteJob], stream: Iterable[tuple[int, str, torch.Tensor]], *, progress: Progress = SILENT
) -> None:
    """Write subnets of one supernet, each weight of each computed once.

    Args:
        cuts: What goes where.
        stream: (position in `cuts`, name, weight), as `materialize.stream_subnets` gives them.
        progress: Told of every weight.

    Raises:
        NotRepresentable: As each format's `check`.
        DiskFull: Before any work, when the files will not fit.
    """
    writers: list[list[Writer]] = []
    for cut in cuts:
        opened = []
        for name, dtype in cut.dtypes.items():
            place = cut.folder / name
            place.mkdir()
            opened.append(FORMATS[name].open_writer(cut.subnet, place, dtype=dtype, **cut.options.get(name, {})))
        writers.append(opened)
    formats = ", ".join(dict.fromkeys(name for cut in cuts for name in cut.dtypes))
    what = f"Writing {formats}" if len(cuts) == 1 else f"Writing {len(cuts)} subnets, {formats}"

    def accept(position: int, name: str, weight: torch.Tensor) -> None:
        for writer in writers[position]:
            writer.accept(name, weight)

    with progress.track(what, sum(len(cut.subnet.specs) for cut in cuts)) as advance, _shared_out(accept, cuts) as take:
        for position, name, weight in stream:
            take(position, name, weight)
            advance(1)
    for writer in chain.from_iterable(writers):
        writer.close()


@contextmanager
def _shared_out(accept: _Accept, cuts: Sequence[WriteJob]) -> Iterator[_Accept]:
    """`accept` done by threads, each of which has cuts of its own, so that what one writer gets stays in order.

    A single cut is written by the caller. At most one weight waits for each thread. Leaving waits for all of them.
    """
    if len(cuts) == 1:
        yield accept
        return
    import torch

    pools = [
        # As many threads of torch's as here: what a writer computes must be the same to the last bit.
        ThreadPoolExecutor(1, "write", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        for _ in range(min(THREADS, len(cuts)))
    ]
    under_way: list[deque[Future[None]]] = [deque() for _ in pools]

    def take(position: int, name: str, weight: torch.Tensor) -> None:
        mine = under_way[position % len(pools)]
        if len(mine) > 1:
            mine.popleft().result()
        mine.append(pools[position % len(pools)].submit(accept, position, name, weight))

    try:
        yield take
        for future in chain.from_iterable(under_way):
            future.result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def write_formats(
    subnet: Subnet,
    folder: Path,
    dtypes: Mapping[str, str],
    *,
    options: Mapping[str, Mapping[str, Any]] = {},
    progress: Progress = SILENT,
) -> None:
    """Write one subnet: `WriteJob` says what the arguments are. Raises as `write_cuts`."""
    cut = WriteJob(subnet=subnet, folder=folder, dtypes=dtypes, options=options)
    write_cuts([cut], ((0, name, weight) for name, weight in subnet.stream()), progress=progress)
