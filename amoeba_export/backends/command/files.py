"""What the placeholders of a model stand for: files of an artifact, or a model of its dims with random weights.

An artifact's name may be a stranger's, and a command may hand its words to a shell (`adb shell` does): a path with
characters that a shell acts on is given as a link whose name is ours.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amoeba_export.backends.command.template import PATHS
from amoeba_export.backends.graphs import artifact_folder, prepare_gguf, prepare_safetensors, spelling
from amoeba_export.backends.runner.weights import write_weights
from amoeba_export.errors import InputError, NotFound
from amoeba_export.ir import TensorSpec, Workload
from amoeba_export.ir.dtype import DTYPES, SOURCE

if TYPE_CHECKING:
    from amoeba_export.backends import Subject

GGUF_NAME = "model.gguf"

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
"""Paths that mean themselves in every shell."""

_POOL = 1 << 16


def path_values(subject: Subject, folder: Path, used: Collection[str], first: str) -> dict[str, str]:
    """Absolute paths of `subject`'s files, of those placeholders that are `used`.

    Args:
        subject: Without an artifact, its files are to be made in `folder`.
        folder: A folder of ours.
        used: Names of placeholders, whichever.
        first: The container that `{artifact}` alone stands for.

    Raises:
        NotFound: The artifact does not have them.
        ForeignCode: It has code of its own.
        InputError: The folder for temporary files has a name that a shell would act on.
    """
    if not _PLAIN.fullmatch(str(folder)):
        raise InputError(
            "The folder for temporary files has a name with characters that a shell acts on.",
            where=folder,
            next_step="Set TMPDIR to a folder without blanks, quotes and the like.",
        )
    root = folder / "model"
    if subject.artifact is not None:
        root = subject.artifact.resolve()
        if not _PLAIN.fullmatch(str(root)):
            link = folder / "artifact"
            if not link.is_symlink():
                link.symlink_to(root)
            root = link
        containers = {*PATHS[1:]} & {*used}
        if "artifact" in used:  # all of it
            containers |= {container for container in PATHS[1:] if (subject.artifact / container).is_dir()} or {first}
        for container in sorted(containers):
            artifact_folder(subject, container)
        if "gguf" in used and not (root / "gguf" / GGUF_NAME).is_file():
            raise NotFound(f"The GGUF file of {subject.label}", root / "gguf" / GGUF_NAME, next_step="Export it again.")
    paths = {"artifact": root, **{container: root / container for container in PATHS[1:]}}
    paths["gguf"] /= GGUF_NAME
    return {name: str(path) for name, path in paths.items()}


def workload_values(subject: Subject, workload: Workload) -> dict[str, str]:
    """What is computed, as words. Raises `InputError` for a dtype that is none: it may come from a stranger's file."""
    if subject.dtype not in (*DTYPES, SOURCE):
        raise InputError(f"The dtype of {subject.label} is none that amoeba writes.", next_step="Export it again.")
    return {
        "prompt": str(workload.prompt_tokens),
        "generate": str(workload.generate_tokens),
        "batch": str(workload.batch),
        "dtype": subject.dtype,
    }


@contextmanager
def present(subject: Subject, folder: Path, used: Collection[str], first: str, options: Any) -> Iterator[None]:
    """The files of placeholders that are `used` exist meanwhile: those of an artifact do anyway.

    Args:
        subject: Without an artifact, a model of its dims with random weights is written.
        folder: As in `path_values`.
        used: Names of placeholders.
        first: As in `path_values`.
        options: The target's options.
    """
    containers = {*PATHS[1:]} & {*used} or ({first} if "artifact" in used else set())
    if subject.artifact is not None or not containers:
        yield
        return
    try:
        for container in sorted(containers):
            place = folder / "model" / container
            place.mkdir(parents=True)
            _RANDOM[container](subject, place, options)
        yield
    finally:
        shutil.rmtree(folder / "model", ignore_errors=True)


def _random_onnx(subject: Subject, folder: Path, options: Any) -> None:
    from amoeba_export.formats.onnx import write_random

    write_random(subject.dense, folder, dtype=subject.dtype, **spelling(options, subject.dtype))


def _random_safetensors(subject: Subject, folder: Path, options: Any) -> None:
    """A Hugging Face folder without a tokenizer, which nobody has for bare dims."""
    import torch

    from amoeba_export.formats.shards import MAX_SHARD_BYTES, SafetensorsWriter
    from amoeba_export.model.foreign_code import MODELING, modeling_file
    from amoeba_export.model.opening import blank_model, read_config

    prepare_safetensors(subject, folder, options)
    config = read_config(folder)
    if getattr(config, "auto_map", None):
        shutil.copyfile(modeling_file(), folder / MODELING)
    with torch.device("meta"):
        weights = {name: tuple(weight.shape) for name, weight in blank_model(config).named_parameters()}
    specs = tuple(TensorSpec(name=name, shape=shape) for name, shape in weights.items())
    dtype = DTYPES[subject.dtype].torch_dtype
    assert dtype is not None, "prepare_safetensors refuses weights that are not floats"
    writer = SafetensorsWriter(folder, specs, zeros=(), dtype=dtype, limit=MAX_SHARD_BYTES)
    pool = torch.empty(_POOL).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    for name, shape in weights.items():
        count, spread = 1, shape[-1] ** -0.5
        for size in shape:
            count *= size
        values = pool * spread if len(shape) > 1 else torch.ones(1)
        if name.endswith(".bias"):
            values = torch.zeros(1)
        # Values repeat along the file, which no kernel notices: `formats.onnx.random_weights` says more.
        writer.accept(name, values.to(dtype).repeat(-(-count // len(values)))[:count].reshape(shape))
    writer.close()


def _random_gguf(subject: Subject, folder: Path, options: Any) -> None:
    """With words that mean nothing for a vocabulary: see `formats.gguf.random_weights`."""
    weights = prepare_gguf(subject, folder, options)["weights"]
    head = folder / weights["head"]
    write_weights(str(folder / weights["file"]), weights["regions"], head=str(head))
    head.unlink()


_RANDOM: dict[str, Callable[[Subject, Path, Any], None]] = {
    "onnx": _random_onnx,
    "safetensors": _random_safetensors,
    "gguf": _random_gguf,
}
"""How a model without an artifact is written, by container."""
