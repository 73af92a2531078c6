"""The published strategy file: what it means, and what it may not do."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amoeba_export.errors import DamagedFile, NotFound, UnsafePickle, UnsupportedError, WrongModel
from amoeba_export.ir import Architecture, Shape, Strategy
from amoeba_export.ir.derive import derive_plan
from amoeba_export.load import check_strategy, import_upstream, load_supernet, read_strategy, write_strategy

NAME = "dp_selection_strategy.npy"
Q0, K0, UP0, O0 = (
    f"base_model.model.model.layers.0.{module}"
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "self_attn.o_proj")
)


@pytest.fixture
def architecture(goldens: Path) -> Architecture:
    return load_supernet(str(goldens / "C" / "base")).architecture


@pytest.fixture
def data(goldens: Path) -> dict[str, Any]:
    """The content of the recorded file, which a test may change."""
    content = np.load(goldens / "C" / NAME, allow_pickle=True).item()
    assert isinstance(content, dict)
    return content


def save(path: Path, data: Any) -> Path:
    np.save(path, np.array(data, dtype=object) if isinstance(data, dict) else data, allow_pickle=True)
    return path


def header() -> bytes:
    """What precedes the pickle in a .npy file of one object."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    return buffer.getvalue()


def gqa(**overrides: Any) -> Architecture:
    """Two layers, 4 query heads over 2 KV heads of 8 channels, 12 neurons, hidden 16."""
    fields: dict[str, Any] = {
        "family": "llama",
        "num_layers": 2,
        "hidden_size": 16,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 12,
        "vocab_size": 32,
        "max_positions": 64,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
    return Architecture(**(fields | overrides))


def gqa_data(q: str = "1100", k: str = "10", v: str = "10", neurons: str = "1" * 11 + "0") -> dict[str, Any]:
    """A strategy for `gqa()` with one width; each character of q, k and v is a head."""

    def bits(text: str, repeat: int = 1) -> Any:
        return np.repeat([character == "1" for character in text], repeat)

    masks: dict[str, Any] = {}
    biases: dict[str, Any] = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}."
        for module, mask in (("q", bits(q, 8)), ("k", bits(k, 8)), ("v", bits(v, 8))):
            masks[f"{name}self_attn.{module}_proj"] = {0.5: mask}
        for module in ("gate", "up"):
            masks[f"{name}mlp.{module}_proj"] = {0.5: bits(neurons)}
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            masks[name + module] = None
            biases[name + module] = {0.5: np.full(16, 0.25, dtype=np.float16)}
    return {"strategy": {1: np.array([1.0, 0.0])}, "metric": {1: 0.5}, "width_mask": masks, "bias": biases}


# --- meaning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "widths"), [("C", [0.8, 0.65, 0.5]), ("C/readme_ratios", [1, 0.875, 0.75, 0.625, 0.5])]
)
def test_masks_and_biases_are_taken_over_as_they_are(
    goldens: Path, architecture: Architecture, ratios: str, widths: list[float]
):
    strategy = import_upstream(goldens / ratios / NAME, architecture)
    recorded = np.load(goldens / ratios / NAME, allow_pickle=True).item()
    assert list(strategy.widths) == widths
    for width, fixed in strategy.widths.items():
        for layer in range(6):
            name = f"base_model.model.model.layers.{layer}"
            assert fixed.heads_LN[layer].tolist() == [recorded["width_mask"][f"{name}.self_attn.q_proj"][width].all()]
            assert np.array_equal(fixed.ffn_LF[layer], recorded["width_mask"][f"{name}.mlp.gate_proj"][width])
            assert np.array_equal(fixed.o_bias_LD[layer], recorded["bias"][f"{name}.self_attn.o_proj"][width])
            assert np.array_equal(fixed.down_bias_LD[layer], recorded["bias"][f"{name}.mlp.down_proj"][width])


def test_depths_and_metrics(goldens: Path, architecture: Architecture):
    strategy = import_upstream(goldens / "C" / NAME, architecture, metric="loss")
    assert strategy.depth == {0: (1,) * 6, 1: (1, 1, 1, 0, 1, 1), 2: (0, 1, 1, 0, 1, 1), 3: (1, 0, 0, 0, 1, 1)}
    assert strategy.depth_metric == pytest.approx({1: 5.23326, 2: 5.22551, 3: 5.20851}, abs=1e-5)
    assert (strategy.metric, strategy.model_id, strategy.importance) == ("loss", None, None)
    assert strategy.provenance["imported_from"] == NAME


def test_every_recorded_shape_keeps_the_recorded_layers(goldens: Path, architecture: Architecture):
    for ratios in ("C", "C/readme_ratios"):
        strategy = import_upstream(goldens / ratios / NAME, architecture)
        recorded = np.load(goldens / ratios / "logits.npz")
        for depth, width, active in zip(
            recorded["num_layers"], recorded["width"], recorded["active_layers"], strict=True
        ):
            plan = derive_plan(strategy, architecture, Shape(int(depth), float(width)))
            assert plan.active_layers(6) == tuple(active)


def test_width_1_without_a_key_keeps_everything_without_a_bias(goldens: Path, architecture: Architecture):
    plan = derive_plan(import_upstream(goldens / "C" / NAME, architecture), architecture, Shape(5, 1.0))
    assert plan.dense(architecture).layers == (architecture.layer_dims,) * 5


def test_the_int_key_1_need_not_keep_everything(goldens: Path, architecture: Architecture):
    strategy = import_upstream(goldens / "C" / "readme_ratios" / NAME, architecture)
    assert strategy.widths[1.0].ffn_LF.sum() == 6 * 192 - 1
    plan = derive_plan(strategy, architecture, Shape(6, 1.0))
    assert (plan.width_key, plan.policy) == (1.0, "adaptive")


def test_an_import_survives_its_own_file(goldens: Path, architecture: Architecture, tmp_path: Path):
    strategy = import_upstream(goldens / "C" / NAME, architecture)
    written = write_strategy(strategy, tmp_path / "s.safetensors")
    supernet = load_supernet(str(goldens / "C" / "base"), strategy=tmp_path / "s.safetensors")
    assert isinstance(supernet.strategy, Strategy)
    assert supernet.strategy.identity == written.identity == supernet.inputs[1].sha256
    assert list(supernet.strategy.widths) == list(strategy.widths)
    check_strategy(supernet.strategy, supernet)


def test_a_depth_strategy_alone(goldens: Path, architecture: Architecture, tmp_path: Path):
    strategy = import_upstream(goldens / "C" / "dp" / "final_strategy.npy", architecture)
    assert strategy.widths == {}
    assert list(strategy.depth) == [0, 1, 2, 3]
    write_strategy(strategy, tmp_path / "s.safetensors")
    plan = derive_plan(read_strategy(tmp_path / "s.safetensors"), architecture, Shape(3, 1.0))
    assert plan.kept_layers == (0, 4, 5)


def test_grouped_heads_and_half_precision_biases(tmp_path: Path):
    strategy = import_upstream(save(tmp_path / NAME, gqa_data()), gqa())
    fixed = strategy.widths[0.5]
    assert fixed.heads_LN.tolist() == [[True, True, False, False]] * 2
    assert fixed.ffn_LF.sum(axis=1).tolist() == [11, 11]
    assert fixed.o_bias_LD.dtype == np.float32 and (fixed.down_bias_LD == 0.25).all()


def test_a_module_without_masks_keeps_everything(tmp_path: Path):
    data = gqa_data()
    for layer in range(2):
        for module in "qkv":
            data["width_mask"][f"base_model.model.model.layers.{layer}.self_attn.{module}_proj"] = None
        data["bias"][f"base_model.model.model.layers.{layer}.self_attn.o_proj"] = None
    fixed = import_upstream(save(tmp_path / NAME, data), gqa()).widths[0.5]
    assert fixed.heads_LN.all() and not fixed.o_bias_LD.any() and not fixed.ffn_LF.all()


def test_numpy_1_wrote_another_module_name(tmp_path: Path, architecture: Architecture, goldens: Path):
    # protocol 3 ends names with a newline; later ones write their length before them
    data = pickle.dumps(np.load(goldens / "C" / NAME, allow_pickle=True), protocol=3)
    assert b"numpy._core.multiarray\n_reconstruct\n" in data
    (tmp_path / NAME).write_bytes(header() + data.replace(b"numpy._core.", b"numpy.core."))
    ours = import_upstream(tmp_path / NAME, architecture)
    assert ours.depth == import_upstream(goldens / "C" / NAME, architecture).depth


# --- refusals ---------------------------------------------------------------------------------------------------------


class Malice:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, architecture: Architecture):
    path = save(tmp_path / NAME, {"strategy": {1: Malice(f"touch {tmp_path / 'ran'}")}})
    with pytest.raises(UnsafePickle) as caught:
        import_upstream(path, architecture)
    assert not (tmp_path / "ran").exists()
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "To load this file would run code: it names posix.system. Amoeba did not load it.\n"
        f"  where: {path}\n"
        "  next:  Do not open it with other tools either; get the file from someone you trust."
    )


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray fromfile", "operator attrgetter"]
)
def test_no_other_name_is_admitted(tmp_path: Path, architecture: Architecture, name: str):
    module, function = name.split()
    (tmp_path / NAME).write_bytes(header() + f"c{module}\n{function}\n(S'x'\ntR.".encode())
    with pytest.raises(UnsafePickle, match=f"it names {module}.{function}"):
        import_upstream(tmp_path / NAME, architecture)


@pytest.mark.parametrize("cut", [0, 5, 100, 2000])
def test_a_truncated_file(goldens: Path, tmp_path: Path, architecture: Architecture, cut: int):
    (tmp_path / NAME).write_bytes((goldens / "C" / NAME).read_bytes()[:cut])
    with pytest.raises(DamagedFile) as caught:
        import_upstream(tmp_path / NAME, architecture)
    assert caught.value.where == str(tmp_path / NAME)


def test_a_missing_file(tmp_path: Path, architecture: Architecture):
    with pytest.raises(NotFound, match=f"The file was not found: {tmp_path / NAME}"):
        import_upstream(tmp_path / NAME, architecture)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros(3), "an array of float64 [3], not a pickled object"),
        (np.array([1, 2], dtype=object), "an array of object [2], not a pickled object"),
        (np.array(None, dtype=object), "a pickled NoneType, not a strategy"),
        ({}, "it has no table of kept layers"),
        ({"strategy": {1: np.array([1.0, 0.5])}}, "the layers kept without 1 are not a vector of 0 and 1"),
        ({"strategy": {1: np.array([1.0, 1.0])}}, "the layers kept without 1 are 2 of 2"),
        ({"strategy": {"one": np.array([1.0, 0.0])}}, "the layers kept without one are 1 of 2"),
        ({"strategy": {1: [1, 0], 2: [1, 0, 0]}}, "its depths have [2, 3] layers"),
        ({"strategy": {1: [1, 0]}, "metric": {1: None}}, "its metric is not a table of numbers"),
        ({"strategy": {1: [1, 0]}, "width_mask": []}, "its width_mask is not a table"),
        (
            {"strategy": {1: [1, 0]}, "width_mask": {Q0: [1]}},
            f"the width_mask of {Q0} is not a table of vectors by ratio",
        ),
        ({"strategy": {1: [1, 0]}, "width_mask": {}}, f"its width_mask has nothing for {Q0}"),
    ],
)
def test_what_is_no_strategy(tmp_path: Path, content: Any, reason: str):
    with pytest.raises(DamagedFile) as caught:
        import_upstream(save(tmp_path / NAME, content), gqa())
    assert reason in caught.value.what


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gqa_data(k="01"), "layer 0: k_proj or v_proj keeps other heads than q_proj"),
        (gqa_data(v="11"), "layer 0: k_proj or v_proj keeps other heads than q_proj"),
    ],
)
def test_heads_that_contradict_each_other(tmp_path: Path, data: dict[str, Any], reason: str):
    with pytest.raises(DamagedFile) as caught:
        import_upstream(save(tmp_path / NAME, data), gqa())
    assert reason in caught.value.what


def test_neurons_that_contradict_each_other(tmp_path: Path):
    data = gqa_data()
    data["width_mask"][UP0][0.5][:6] = False
    with pytest.raises(DamagedFile, match="layer 0: gate_proj and up_proj keep different neurons"):
        import_upstream(save(tmp_path / NAME, data), gqa())


def test_a_width_that_is_not_everywhere(tmp_path: Path):
    data = gqa_data()
    data["bias"][O0] = {0.25: np.zeros(16)}
    with pytest.raises(DamagedFile, match=r"layer 0: self_attn\.o_proj has nothing for the ratio 0\.5"):
        import_upstream(save(tmp_path / NAME, data), gqa())


def test_a_bias_with_nan(tmp_path: Path):
    data = gqa_data()
    data["bias"][O0][0.5][3] = np.nan
    with pytest.raises(DamagedFile, match=r"layer 0: the bias of self_attn\.o_proj is not finite"):
        import_upstream(save(tmp_path / NAME, data), gqa())


def test_parts_of_a_head_cannot_be_kept(tmp_path: Path):
    data = gqa_data()
    data["width_mask"][Q0][0.5][3] = False
    with pytest.raises(UnsupportedError) as caught:
        import_upstream(save(tmp_path / NAME, data), gqa())
    assert str(caught.value) == (
        "The strategy cuts inside a head of layer 0 (heads here have 8 channels).\n"
        f"  where: {tmp_path / NAME}\n"
        "  next:  Give the model that it was made for; parts of a head cannot be kept."
    )


def test_a_mask_where_nothing_is_cut(tmp_path: Path):
    data = gqa_data()
    data["width_mask"]["base_model.model.lm_head"] = {0.5: np.ones(32, dtype=bool)}
    with pytest.raises(UnsupportedError, match=r"The strategy has a width_mask for base_model\.model\.lm_head\."):
        import_upstream(save(tmp_path / NAME, data), gqa())


@pytest.mark.parametrize(
    ("overrides", "difference"),
    [
        ({"num_layers": 3}, "num_layers is 2 there and 3 here"),
        ({"num_heads": 8}, "self_attn.q_proj has 32 channels there and 64 here"),
        ({"ffn_size": 24}, "mlp.gate_proj has 12 channels there and 24 here"),
        ({"hidden_size": 32}, "self_attn.o_proj has 16 channels there and 32 here"),
    ],
)
def test_a_strategy_for_another_model(tmp_path: Path, overrides: dict[str, Any], difference: str):
    with pytest.raises(WrongModel) as caught:
        import_upstream(save(tmp_path / NAME, gqa_data()), gqa(**overrides))
    assert caught.value.what == f"The strategy was made for another model: {difference}."
