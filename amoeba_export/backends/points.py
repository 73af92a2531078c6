"""Published and measured speeds of whole models, as rows of a CSV file: what the figures of a target are fitted to."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from amoeba_export.backends.analytic import Work, work_of
from amoeba_export.errors import BadRecord, InputError
from amoeba_export.formats.sizes import sum_bytes, weight_bytes
from amoeba_export.ir import Architecture, DenseArchitecture, Workload
from amoeba_export.ir.dtype import DTYPE_NAMES
from amoeba_export.reading.records import read_text

_Count = Annotated[int, Field(ge=1, le=10_000_000)]

PointMetric = Literal["decode", "prefill"]

_OURS = MappingProxyType({"Q8_0": ("gguf", "int8"), "Q4_0": ("gguf", "int4")})
"""Precisions that a format of ours writes under another name: format and dtype."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Bits of a number, block scales included, where rows are whole blocks; and where they are not."""

    bits: float
    block: int = 1
    odd_bits: float | None = None

    def matrix_bytes(self, rows: int, columns: int) -> int:
        odd = self.odd_bits is not None and columns % self.block
        return round(rows * columns * ((self.odd_bits or 0) if odd else self.bits) / 8)


_OTHERS = MappingProxyType(
    {
        "fp16": _Blocks(16),
        "int4 g128": _Blocks(4 + 16 / 128, 128),  # symmetric: one fp16 scale a group
        "int4 g32": _Blocks(4 + 16 / 32, 32),
        "Q4_0": _Blocks(18 * 8 / 32, 32),
        "Q8_0": _Blocks(34 * 8 / 32, 32),
        "Q6_K": _Blocks(210 * 8 / 256, 256, 34 * 8 / 32),
        # A mixture: the mean of the layers of a file; rows of no whole super-block fall back to Q5_0 and Q8_0.
        "Q4_K_M": _Blocks(4.85, 256, 5.6),
    }
)
"""Precisions of heads, and those that no format of ours writes."""


class Point(BaseModel):
    """One speed of one model. Its fields are the columns of the file, in which `metric` also says the unit.

    Attributes:
        weights: A `--dtype`, or a name of `_OURS` or `_OTHERS`.
        head: The precision of lm_head, where `weights` is a name of `_OTHERS`.
        tokens: In the KV cache for a decode, in the prompt for a prefill.
        value: Tokens per second of `decode_tok_s`, milliseconds of `prefill_ms` and `decode_ms`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    device: str
    power_mode: str = ""
    flow: str
    weights: str
    head: str = ""
    model: str
    hidden: _Count
    layers: _Count
    heads: _Count
    kv_heads: _Count
    head_dim: _Count
    ffn: _Count
    vocab: _Count
    tied: bool
    metric: Literal["decode_tok_s", "decode_ms", "prefill_ms"]
    tokens: _Count
    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source: str = ""

    @property
    def kind(self) -> PointMetric:
        """What was timed."""
        return "prefill" if self.metric == "prefill_ms" else "decode"

    @property
    def milliseconds(self) -> float:
        """Of one step."""
        return 1000 / self.value if self.metric == "decode_tok_s" else self.value

    @property
    def dense(self) -> DenseArchitecture:
        """The model, whole."""
        return Architecture(
            family="llama",
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn_size=self.ffn,
            vocab_size=self.vocab,
            max_positions=max(self.tokens, 2048),
            norm_eps=1e-5,
            rope_theta=10000.0,
            tied_embeddings=self.tied,
        ).uncut

    def work(self) -> Work:
        """What the step asks of the device, by the same rules as an estimate of a cut."""
        dense = self.dense
        if self.weights in DTYPE_NAMES and not self.head:
            weights = weight_bytes(dense, ("safetensors", "onnx"), self.weights)
        elif self.weights in _OURS and self.head in ("", "Q8_0"):
            container, dtype = _OURS[self.weights]
            weights = weight_bytes(dense, (container,), dtype)
        else:
            layers, head = _OTHERS[self.weights], _OTHERS[self.head or self.weights]
            weights = sum_bytes(dense, matrix=layers.matrix_bytes, head=head.matrix_bytes, vector_bytes=2)
        new_tokens = self.tokens if self.kind == "prefill" else 1
        return work_of(dense, new_tokens, Workload(prompt_tokens=self.tokens), weights=weights)


def read_points(path: Path) -> list[Point]:
    """The rows of a CSV file whose first line names the fields of `Point`.

    Raises:
        InputError: The file cannot be read, or has no rows.
        BadRecord: A row has a mistake; the first one is named with its line.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, what="list of points")))
    points = []
    for row in reader:
        line = reader.line_num
        if None in row or None in row.values():
            raise _bad(path, line, f"does not have {len(reader.fieldnames or ())} fields")
        try:
            point = Point.model_validate({name: value for name, value in row.items() if value != ""})
        except ValidationError as error:
            raise _bad(path, line, _said(error)) from error
        for precision in filter(None, (point.weights, point.head)):
            if precision not in {*DTYPE_NAMES, *_OURS, *_OTHERS}:
                known = ", ".join(dict.fromkeys((*DTYPE_NAMES, *_OURS, *_OTHERS)))
                raise _bad(path, line, f"has the precision '{precision}', which is none of {known}")
        points.append(point)
    if not points:
        raise InputError("The list of points has no rows.", where=path, next_step="Add a row for each measurement.")
    return points


def _said(error: ValidationError) -> str:
    detail = error.errors()[0]
    name = ".".join(map(str, detail["loc"]))
    if detail["type"] == "missing":
        return f"has no {name}"
    if detail["type"] == "extra_forbidden":
        return f"has the unknown column '{name}'"
    return f"has {detail['input']!r} as its {name}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _bad(path: Path, line: int, problem: str) -> BadRecord:
    return BadRecord(path, line, problem, what="list of points", next_step="Correct the row.")


def by_group(points: list[Point]) -> Mapping[tuple[str, str], list[Point]]:
    """The points of each device and flow."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.device, point.flow), []).append(point)
    return groups
