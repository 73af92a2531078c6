"""llama.cpp times GGUF artifacts, layers that differ included. It wants a tokenizer in them."""

from __future__ import annotations

import pytest

from amoeba_export.backends import Subject, measure_latency
from amoeba_export.errors import TargetError
from amoeba_export.ir import Latency, Target, Workload
from amoeba_export.materialize import materialize_subnet
from tests.backends.models import SHORT
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import open_supernet, plan_for, write
from tests.tiny import save_tiny

pytest.importorskip("xllamacpp")

TARGET = Target(name="some-llamacpp", description="a target", backend="llamacpp", options={"threads": 1})


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = save_tiny(tmp_path_factory.mktemp("llamacpp") / "model")
    save_bpe(folder)
    supernet = open_supernet(folder)
    plan = plan_for(supernet, "3x0.5", "adaptive")
    write(materialize_subnet(supernet, plan), folder.parent / "artifact" / "gguf", "gguf", "fp16")
    dense = plan.dense(supernet.architecture)
    return Subject(dense=dense, artifact=folder.parent / "artifact", dtype="fp16", label="cut")


def test_an_artifact_is_timed(subject: Subject) -> None:
    (result,) = measure_latency([subject], SHORT, target=TARGET, rounds=1)
    assert isinstance(result, Latency), result
    assert result.source == "measured"
    assert 0 < result.decode.p50_ms <= result.decode.p90_ms
    assert 0 < result.prefill.p50_ms <= result.prefill.p90_ms


def test_several_sequences_are_its_subjects_error(subject: Subject) -> None:
    batch = Workload(prompt_tokens=8, generate_tokens=8, batch=2)
    (result,) = measure_latency([subject], batch, target=TARGET, rounds=1)
    assert isinstance(result, TargetError)
    assert "llama.cpp is timed with one sequence; use --batch 1" in str(result)
