from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from amoeba_export.calibrate.width import ChannelStatistics, make_importance, measure_importance, standardise
from amoeba_export.errors import NotANumber
from amoeba_export.ir import Importance, Supernet
from amoeba_export.load import load_supernet
from amoeba_export.model.layers import LayerStack
from amoeba_export.model.samples import Samples, text_batches
from amoeba_export.model.states import StateStore
from tests.model.models import random_samples, tiny_supernet, whole_model

RESIDENT = 10**9


def measure(supernet: Supernet, samples: Samples, folder: Path, *, metric="WIFV", memory_bytes=RESIDENT) -> Importance:
    stack = LayerStack(supernet, memory_bytes=memory_bytes)
    states = StateStore(stack, samples, folder / "states", limit_bytes=RESIDENT)
    return measure_importance(states, metric=metric, folder=folder / "channels")


def test_statistics_of_batches_are_those_of_the_whole() -> None:
    """Also where the mean is far from zero, which a sum of squares in fp32 does not survive."""
    x_TC = np.random.default_rng(0).normal(size=(1000, 5)) * [1, 2, 3, 1e-3, 5] + [0, 1, 100, 1000, -7]
    statistics = ChannelStatistics()
    for part in np.array_split(x_TC, [1, 2, 300, 301]):
        statistics.add(torch.tensor(part))
    np.testing.assert_allclose(statistics.mean_C, x_TC.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.variance(), x_TC.var(axis=0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(statistics.mean_square(), (x_TC**2).mean(axis=0), rtol=1e-12)


@torch.no_grad()
def inputs_of(supernet: Supernet, samples: Samples, layer: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs [T, C] and weight [O, C] of the two projections, from the whole model."""
    model, seen = whole_model(supernet), {"o": [], "down": []}
    block = model.model.layers[layer]
    modules = {"o": block.self_attn.o_proj, "down": block.mlp.down_proj}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].double()))
    for batch in samples.batches:
        model(batch.tokens_BT, use_cache=False)
    return {
        name: (torch.cat([x.flatten(0, 1) for x in seen[name]]).numpy(), module.weight.detach().double().numpy())
        for name, module in modules.items()
    }


@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN", "wanda"])
@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen3"])
def test_importance_from_the_definition(tmp_path: Path, family: str, metric) -> None:
    supernet = tiny_supernet(tmp_path / "model", family)
    samples = random_samples(count=5)
    found = measure(supernet, samples, tmp_path, metric=metric)
    head_dim = supernet.architecture.head_dim
    for layer in (0, 3):
        scores = {}
        for name, (x_TC, w_OC) in inputs_of(supernet, samples, layer).items():
            scores[name] = {
                "IFV": x_TC.var(axis=0, ddof=1),
                "WIFV": x_TC.var(axis=0, ddof=1) * (w_OC**2).sum(axis=0),
            }.get(metric, np.abs(w_OC).mean(axis=0) * np.sqrt((x_TC**2).mean(axis=0)))
            if name == "o" and metric != "wanda":
                scores[name] = scores[name] ** 2
            mean = found.o_mean_LQ[layer] if name == "o" else found.down_mean_LF[layer]
            np.testing.assert_allclose(mean, x_TC.mean(axis=0), atol=1e-5)
        z = {name: (s - s.mean()) / s.std(ddof=1) for name, s in scores.items()}
        np.testing.assert_allclose(found.ffn_LF[layer], z["down"], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            found.heads_LN[layer], z["o"].reshape(-1, head_dim).mean(axis=1), rtol=1e-3, atol=1e-4
        )
    assert found.metric == metric


def test_streamed_and_resident_are_the_same_bits(supernet: Supernet, tmp_path: Path) -> None:
    samples = random_samples()
    first = measure(supernet, samples, tmp_path / "a")
    second = measure(supernet, samples, tmp_path / "b", memory_bytes=1000)
    for name in ("heads_LN", "ffn_LF", "o_mean_LQ", "down_mean_LF"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_padding_does_not_count(supernet: Supernet, tmp_path: Path) -> None:
    """A batch of a long and a short sample is the two of them alone."""
    long, short = list(range(20, 32)), list(range(40, 47))
    alone = Samples((*text_batches([long], 1), *text_batches([short], 1)))
    padded = text_batches([long, [*short, *[0] * 5]], 2)[0]
    object.__setattr__(padded, "lengths_B", torch.tensor([12, 7]))
    first, second = (measure(supernet, s, tmp_path / str(i)) for i, s in enumerate((alone, Samples((padded,)))))
    np.testing.assert_allclose(first.ffn_LF, second.ffn_LF, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(first.o_mean_LQ, second.o_mean_LQ, atol=1e-5)


def test_means_recorded_from_the_published_code(goldens: Path, tmp_path: Path) -> None:
    """They are kept in half precision there. The published fluctuation is another statistic (see `ChannelStatistics`),
    so scores only agree in tendency."""
    stats = np.load(goldens / "C/flap/flap_stats.npz")
    supernet = load_supernet(str(goldens / "C/base"))
    found = measure(supernet, Samples(tuple(text_batches(stats["calib_tokens"].tolist(), 1))), tmp_path)
    np.testing.assert_allclose(found.o_mean_LQ, stats["attn_baseline_inp_list"], atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(found.down_mean_LF, stats["mlp_baseline_inp_list"], atol=2e-3, rtol=2e-3)
    for ours, theirs in zip(found.ffn_LF, stats["standardised_mlp_metric"], strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.95


def test_standardised_scores_recorded_from_the_published_code(goldens: Path) -> None:
    stats = np.load(goldens / "C/flap/flap_stats.npz")
    ours = make_importance(
        np.sqrt(stats["attn_metric_list"].astype(np.float64)),
        stats["mlp_metric_list"].astype(np.float64),
        stats["attn_baseline_inp_list"].astype(np.float64),
        stats["mlp_baseline_inp_list"].astype(np.float64),
        metric="WIFV",
        head_dim=128,
    )
    np.testing.assert_allclose(ours.ffn_LF, stats["standardised_mlp_metric"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.heads_LN, stats["standardised_attn_metric"], atol=1e-6)


def test_equal_scores_are_all_average() -> None:
    np.testing.assert_array_equal(standardise(np.full((2, 3), 7.0)), np.zeros((2, 3)))
    np.testing.assert_array_equal(standardise(np.full((2, 1), 7.0)), np.zeros((2, 1)))


def test_finished_layers_are_not_measured_again(supernet: Supernet, tmp_path: Path) -> None:
    samples = random_samples()
    expected = measure(supernet, samples, tmp_path)
    (tmp_path / "channels/importance-0004.sealed").unlink()
    stack = LayerStack(supernet, memory_bytes=RESIDENT)
    states = StateStore(stack, samples, tmp_path / "states", limit_bytes=RESIDENT)
    again = measure_importance(states, metric="WIFV", folder=tmp_path / "channels")
    assert stack.work.layer_tokens == 2 * samples.num_tokens
    np.testing.assert_array_equal(again.ffn_LF, expected.ffn_LF)


def test_statistics_that_are_not_finite(supernet: Supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerStack, "embed", lambda self, tokens_BT: torch.full((*tokens_BT.shape, 96), torch.nan))
    with pytest.raises(NotANumber) as caught:
        measure(supernet, random_samples(), tmp_path)
    assert caught.value.what == "The importance of layer 0 of the model with all its layers is not a number."
