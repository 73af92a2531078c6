"""One stream of weights into several containers at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amoeba_export.errors import NotRepresentable
from amoeba_export.formats import FORMATS
from amoeba_export.ir import SILENT, DenseArchitecture, Progress, Subnet


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
        FORMATS[name].check(dense, dtype=chosen)
    return dtypes


def write_formats(
    subnet: Subnet,
    folder: Path,
    dtypes: Mapping[str, str],
    *,
    options: Mapping[str, Mapping[str, Any]] = {},
    progress: Progress = SILENT,
) -> None:
    """Write `subnet` into `folder/<format>/` for each format of `dtypes`, computing each weight once.

    Args:
        subnet: The cut model.
        folder: The artifact's folder; it exists.
        dtypes: Each format with its dtype, from `format_dtypes`.
        options: Further settings of a format's `open_writer`, such as the dialect of an ONNX graph.
        progress: Told of every weight.

    Raises:
        NotRepresentable: As each format's `check`.
        DiskFull: Before any work, when the files will not fit.
    """
    writers = []
    for name, dtype in dtypes.items():
        place = folder / name
        place.mkdir()
        writers.append(FORMATS[name].open_writer(subnet, place, dtype=dtype, **options.get(name, {})))
    with progress.track(f"Writing {', '.join(dtypes)}", len(subnet.specs)) as advance:
        for name, weight in subnet.stream():
            for writer in writers:
                writer.accept(name, weight)
            advance(1)
    for writer in writers:
        writer.close()
