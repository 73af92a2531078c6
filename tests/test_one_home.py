"""Decisions have no second copy, and a word names one class. Where each is decided: ARCHITECTURE.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "amoeba_export"

WORDS = ("Batch", "Cache", "Cut", "Gate", "Measurement", "Objective", "Question", "Session", "Settings", "Subject")

HOMES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("the names of the dtypes", r"^DTYPE_NAMES\b|^DtypeName\b", ("ir/dtype.py",)),
    ("the bits of a dtype", r"\bbits=\d+, torch_name|\"int8\": 8\b", ("ir/dtype.py", "verify/stored/tensor.py")),
    ("how a dtype spells its floats", r"\bsafetensors_name=\"|torch\.float16: \"", ("ir/dtype.py",)),
    ("what ONNX makes of a dtype", r"\"int4-mixed\": Precision\(|^PRECISIONS\b", ("formats/onnx/precision.py",)),
    ("what GGUF makes of a dtype", r"\"q6_k\": _Type\.|^K_QUANTS\b", ("formats/gguf/k_quants.py",)),
    ("what a packed file makes of a dtype", r"\"w4a16-asym\": Scheme\(|^SCHEMES\b", ("formats/packed.py",)),
    ("which dtypes are equalized", r"\"onnx\": \(\"int8\"|^EQUALIZED\b", ("formats/equalize.py",)),
    ("the blocks of a dtype", r"\bBlockwise\(\d", ("formats/onnx/precision.py",)),
    ("what is exact", r"^FLOATS\b|is_quantized=", ("ir/dtype.py",)),
    ("how far logits may be off", r"^MAX_(REL_DIFF|ROUNDING|KL|PERPLEXITY_RATIO)\b", ("verify/numerics.py",)),
    ("how far a weight may be off", r"^HALF_ULP\b|2\.0\*\*-(8|11|24)\b", ("verify/numerics.py",)),
    ("the bytes of weights", r"^def (sum_bytes\b|weight_bytes\(.* formats:)", ("formats/sizes.py",)),
    (
        "the bytes of a format's weights",
        r"^def weight_bytes\(dense: DenseArchitecture, \*",
        ("formats/gguf/__init__.py", "formats/onnx/__init__.py", "formats/safetensors.py"),
    ),
    ("a value that fp16 cannot hold", r"exceed its range", ("errors.py",)),
    ("the precision of a supernet", r"dtype: str = \"fp32\"|\] = \"fp32\"", ("backends/__init__.py",)),
    ("whether it belongs to this model", r"this one is \{|\bmodel_id [!=]=|\bstrategy_id [!=]=", ("ir/belongs.py",)),
    (
        "which way a metric is better",
        r"\"max\" if metric|mode_of\(.*\) == ",
        ("ir/metric.py",),
    ),
    ("what better means", r"mode == \"(min|max)\"", ("ir/metric.py",)),
    ("what a budget allows", r"\.resolve\((self|full|reference)\.of\(|\.percentile\) (<=|/) ", ("ir/latency.py",)),
    ("the quality record", r"^class QualityFile\b|\"pareto\": ", ("evaluate/quality.py",)),
    ("JSON from outside", r"parse_constant|object_pairs_hook", ("reading/json_object.py",)),
    ("JSON that was written and read back", r"loads\(json\.dumps", ("reading/json_object.py",)),
    ("JSON in a cache entry", r"json\.loads\(\((found|entry|place) / ", ("cache/store.py",)),
    ("versions of algorithms", r"\bAlgorithm\(name=|^_?[A-Z]*VERSION = ", ("cache/kinds.py",)),
    ("versions of schemas", r"schema version \{", ("reading/json_object.py",)),
    ("atomic files", r"\.part\b\"|\bos\.replace\(", ("replacing.py",)),
    ("large reserved files", r"posix_fallocate|ftruncate|os\.pwrite", ("reserved_file.py",)),
    ("whether a disk has room", r"shutil\.disk_usage\(.*free\) <", ("reserved_file.py",)),
    ("the dims of the uncut model", r"def uncut\b|layers=\(.*,\) \* .*num_layers", ("ir/architecture.py",)),
    ("the plan that keeps everything", r"def full\(cls|def full\($|heads=tuple\(range\(.*num_heads", ("ir/plan.py",)),
    ("the nearest gate width", r"min\(.*gate_widths|abs\(.* - width\), -", ("ir/plan.py",)),
    ("defaults of training", r"^    (learning_rate|warmup): float = ", ("finetune/settings.py", "refit/recipe.py")),
    ("Student's t", r"math\.atan2|stdtrit|t\.ppf", ("student_t.py",)),
    ("Pareto fronts", r"nowhere_worse|\(points <= ", ("ir/pareto.py",)),
    ("the MMLU prompt", r"\bAnswer:\"|\{letter\}\. \{choice\}", ("reading/questions.py",)),
    (
        "what calibrates where no strategy is given",
        r"\bload_recipe\b.*\brequest\.recipe\b",
        ("application/resolve.py", "builds/inputs.py"),
    ),
    ("a refit recipe with the user's texts", r"\.with_texts\(", ("application/request.py",)),
    ("that every weight is given once", r"was given twice", ("formats/awaited.py",)),
    ("what a head of some tokens takes of its weight", r"\.take_rows\(", ("formats/onnx/vocabulary.py",)),
    (
        "the vectors of a compensation",
        r"else \w+\.down_bias_LD|else .*\.down_mean_LF",
        ("model/bias.py", "verify/unmerged.py"),
    ),
    ("whether a refit is shipped", r"\bLEAST_HARM\b", ("application/refits.py",)),
    ("regular expressions from outside", r"\bre\.error\b", ("reading/patterns.py",)),
    ("whether there is a tokenizer", r"\"tokenizer\.model\", \"vocab\.json\"\)", ("model/tokenizer.py",)),
    ("JSONL from users", r"decode\(\"utf-8-sig\"\)", ("reading/records.py",)),
    ("a plan as data", r"def from_json\(.*-> SubnetPlan|PLAN_SCHEMA =", ("ir/plan.py",)),
)
"""A decision, what a second copy of it would have in it, and the files that have it: these, and no others.

A file is verified by what it stores and not by what wrote it, so `verify/` has tables of its own. A build compares its
inputs before torch is there, so `builds/inputs.py` reads what a session reads later.
"""


def having(pattern: str) -> list[str]:
    """The modules whose text has it."""
    return sorted(
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    )


@pytest.mark.parametrize("word", WORDS)
def test_a_word_names_one_class(word: str) -> None:
    """The options of a backend are its `Options`, each in its own module, and not asked here."""
    found = having(rf"^class _?{word}\b")
    assert len(found) == 1, found


@pytest.mark.parametrize("name", ["precision.py", "quality.py", "utils.py", "helpers.py", "common.py"])
def test_a_name_says_which_module_is_meant(name: str) -> None:
    found = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob(name)]
    assert len(found) <= (name in ("precision.py", "quality.py")), found


@pytest.mark.parametrize(("decision", "trace", "homes"), HOMES, ids=[decision for decision, _, _ in HOMES])
def test_a_decision_has_no_second_copy(decision: str, trace: str, homes: tuple[str, ...]) -> None:
    assert having(trace) == sorted(homes), decision
