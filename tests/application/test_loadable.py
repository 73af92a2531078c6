"""The `[limits]` of a target: a search keeps to them and says what that costs, a given plan outside is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amoeba_export import ExportRequest
from amoeba_export.application.assemble import write_plan
from amoeba_export.application.pipeline import search
from amoeba_export.errors import NothingLoads, OutsideLimits
from amoeba_export.ir import Architecture, DenseArchitecture, LayerDims, RuntimeLimits, Shape
from amoeba_export.ir.derive import CutRules, derive_plan
from amoeba_export.load import load_supernet, read_strategy
from tests.search.strategies import write_graded

FIGURES = """
[options]
bandwidth_gb_s = 1
bandwidth_efficiency = 1
compute_tflops = 1
per_layer_ms = 0.001
uncertainty = 0.1
"""


class Heard:
    """A progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        """Not of interest."""

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda steps: None


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMOEBA_CACHE", str(tmp_path / "cache"))


def board(folder: Path, limits: str) -> str:
    """An estimated target whose runtime has `limits`."""
    path = folder / "board.toml"
    head = 'description = "a board"\nbackend = "analytic"\ndtype = "fp16"\nformats = ["safetensors"]\n'
    path.write_text(f'{head}{FIGURES}\n[limits]\nruntime = "Runtime"\n{limits}\n')
    return str(path)


def searched(model: Path, folder: Path, limits: str, latency: str = "90%") -> tuple[DenseArchitecture, list[str]]:
    """What is chosen under `limits`, and what was said."""
    heard = Heard()
    request = ExportRequest(
        model=str(model),
        strategy=write_graded(model, folder / "strategy.safetensors"),
        target=board(folder, limits),
        latency=latency,
    )
    result = search(request, progress=heard)
    return result.plan.dense(result.supernet.architecture), heard.notes


def test_without_limits_the_same_search_leaves_them(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """The other tests would show nothing otherwise."""
    dense, notes = searched(tiny_dirs["llama"], tmp_path, "")
    layer = dense.layers[0]
    assert layer.num_heads * 32 % 128
    assert layer.ffn_size % 32
    assert layer.down_bias
    assert not [note for note in notes if "cost" in note]


def test_a_search_keeps_to_multiples_and_says_what_they_cost(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    dense, notes = searched(tiny_dirs["llama"], tmp_path, "ffn_multiple = 32\nquery_multiple = 128")
    assert all(layer.num_heads == 4 for layer in dense.layers)
    assert all(layer.ffn_size % 32 == 0 for layer in dense.layers)
    (cost,) = [note for note in notes if note.startswith("The limits of Runtime cost: loss ")]
    worse, better = map(float, re.findall(r"(-?[0-9.]+) at [0-9]+x", cost))
    assert worse > better


def test_multiples_hold_in_their_precisions_only(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    limits = 'ffn_multiple = 32\nquery_multiple = 128\nmultiples_of = ["int4"]'
    dense, _ = searched(tiny_dirs["llama"], tmp_path, limits)
    free, _ = searched(tiny_dirs["llama"], tmp_path, "")
    assert dense.layers == free.layers


def test_a_runtime_without_output_biases_gets_none(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    dense, notes = searched(tiny_dirs["llama"], tmp_path, 'output_biases = ["mistral"]')
    assert not any(layer.o_bias or layer.down_bias for layer in dense.layers)
    assert any(note.startswith("Runtime computes no biases on o_proj and down_proj of a llama:") for note in notes)
    kept, _ = searched(tiny_dirs["llama"], tmp_path, 'output_biases = ["llama"]')
    assert any(layer.down_bias for layer in kept.layers)


def test_a_container_without_output_biases_gets_none(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp's `qwen3` has no biases at all. Other containers of the same model do."""
    for formats, is_compensated in ((("gguf",), False), (("safetensors",), True)):
        heard = Heard()
        request = ExportRequest(
            model=str(tiny_dirs["qwen3"]),
            strategy=write_graded(tiny_dirs["qwen3"], tmp_path / "strategy.safetensors"),
            target=board(tmp_path, ""),
            latency="80%",
            formats=formats,
        )
        result = search(request, progress=heard)
        layers = result.plan.dense(result.supernet.architecture).layers
        assert any(layer.o_bias or layer.down_bias for layer in layers) == is_compensated
        said = "GGUF holds no biases on what writes into the residual stream of a qwen3: "
        assert any(note.startswith(said) for note in heard.notes) != is_compensated


def test_hidden_is_a_multiple_of_the_heads(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    """96 is a multiple of 6, 4 and 2 heads: nothing changes. 64 and 3 of 4 heads: no shape may keep 3."""
    dense, _ = searched(tiny_dirs["llama-mha"], tmp_path, "hidden_by_heads = true", "75%")
    assert all(64 % layer.num_heads == 0 for layer in dense.layers)


def test_layers_are_alike_where_the_runtime_wants_that(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    for limits, is_uniform in (("uniform = true", True), ("", False)):
        heard = Heard()
        request = ExportRequest(
            model=str(tiny_dirs["llama"]),
            strategy=write_graded(tiny_dirs["llama"], tmp_path / "strategy.safetensors"),
            target=board(tmp_path, limits),
            latency="80%",
            policy="adaptive",
        )
        result = search(request, progress=heard)
        assert result.plan.dense(result.supernet.architecture).is_uniform is is_uniform


@pytest.mark.parametrize("limit", ["hidden_multiple = 128", "query_multiple = 4096"])
def test_a_model_that_a_precision_is_not_loaded_in_is_searched_in_the_others(
    limit: str, tiny_dirs: dict[str, Path], tmp_path: Path
) -> None:
    path = Path(board(tmp_path, f'{limit}\nmultiples_of = ["fp16"]'))
    path.write_text(path.read_text().replace('dtype = "fp16"', 'dtype = ["fp16", "bf16"]'))
    request = ExportRequest(
        model=str(tiny_dirs["llama"]),
        strategy=write_graded(tiny_dirs["llama"], tmp_path / "strategy.safetensors"),
        target=str(path),
        latency="90%",
    )
    assert search(request).settings.dtype == "bf16"


def test_nothing_that_a_runtime_loads_is_no_shape(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NothingLoads, match="Runtime loads no shape that the strategy knows") as caught:
        searched(tiny_dirs["llama"], tmp_path, "query_multiple = 4096")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ("ffn_multiple = 128", "an FFN of 48 is no multiple of 128"),
        ("query_multiple = 128", "2 heads of 32 are no multiple of 128"),
        ("output_biases = false", "biases on o_proj or down_proj of a llama are not computed"),
        ("output_biases = false\nffn_multiple = 128", "an FFN of 48 is no multiple of 128; biases"),
        ("hidden_multiple = 128", "a hidden size of 96 is no multiple of 128"),
    ],
)
def test_a_given_plan_outside_is_refused(tiny_dirs: dict[str, Path], tmp_path: Path, limits: str, problem: str) -> None:
    model = tiny_dirs["llama"]
    path = write_graded(model, tmp_path / "strategy.safetensors")
    supernet = load_supernet(str(model), strategy=path)
    assert supernet.strategy
    plan = derive_plan(supernet.strategy, supernet.architecture, Shape(3, 0.4), CutRules(align=16))
    write_plan(plan, tmp_path)
    request = ExportRequest(
        model=str(model), strategy=path, plan=tmp_path / "plan.json", target=board(tmp_path, limits), dtype="fp16"
    )
    with pytest.raises(OutsideLimits) as caught:
        search(request)
    assert caught.value.exit_code == 7
    assert problem in str(caught.value)
    assert "Runtime of target 'board' does not load this plan" in str(caught.value)
    assert search(dataclasses.replace(request, target=board(tmp_path, ""))).plan == plan


def test_each_rule_finds_its_fault() -> None:
    base = Architecture(
        family="llama", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=128,
        vocab_size=64, max_positions=64, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    whole = LayerDims(num_heads=4, num_kv_heads=4, ffn_size=128)
    odd = LayerDims(num_heads=3, num_kv_heads=3, ffn_size=96, o_bias=True)
    dense = DenseArchitecture(base=base, layers=(whole, odd))
    assert RuntimeLimits().problems(dense) == []
    assert RuntimeLimits(ffn_multiple=64).problems(dense) == ["an FFN of 96 is no multiple of 64"]
    assert RuntimeLimits(query_multiple=64).problems(dense) == ["3 heads of 16 are no multiple of 64"]
    assert RuntimeLimits(query_multiple=64, multiples_of=("int4",)).problems(dense, "fp16") == []
    assert RuntimeLimits(hidden_multiple=128).problems(dense) == ["a hidden size of 64 is no multiple of 128"]
    assert RuntimeLimits(hidden_multiple=128, multiples_of=("w4a16",)).problems(dense, "bf16") == []
    assert RuntimeLimits(hidden_by_heads=True).problems(dense) == ["a hidden size of 64 is no multiple of 3 heads"]
    assert RuntimeLimits(uniform=True).problems(dense) == ["layers differ in their dims"]
    assert RuntimeLimits(output_biases=("qwen2",)).problems(dense) == [
        "biases on o_proj or down_proj of a llama are not computed"
    ]
    assert RuntimeLimits(query_multiple=128).head_multiple(base, None) == 8
    assert RuntimeLimits(output_biases=(), ffn_multiple=2, multiples_of=("int4",), uniform=True).in_words() == [
        "FFN a multiple of 2 in int4",
        "no bias on o_proj, down_proj (cuts of all families are not compensated)",
        "all layers alike",
    ]


def test_what_is_not_compensated_by_a_limit_is_in_the_plan(tiny_dirs: dict[str, Path], tmp_path: Path) -> None:
    strategy = read_strategy(write_graded(tiny_dirs["llama"], tmp_path / "strategy.safetensors"))
    plain = dataclasses.replace(strategy, compensates=False)
    architecture = load_supernet(str(tiny_dirs["llama"])).architecture
    assert derive_plan(strategy, architecture, Shape(4, 0.5)).compensate
    plan = derive_plan(plain, architecture, Shape(4, 0.5))
    assert not plan.compensate
    assert plan.strategy_id == strategy.identity
