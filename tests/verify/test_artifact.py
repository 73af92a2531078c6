from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.errors import DamagedFile, NotFound, NumbersDiffer
from amoeba_export.ir import Supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import verify_artifact
from tests.materialize.subnets import bare_plan, open_supernet, plan_for, write


@pytest.fixture
def llama(tiny_dirs: dict[str, Path]) -> Supernet:
    return open_supernet(tiny_dirs["llama"])


@pytest.mark.parametrize("format_name", ["safetensors", "onnx"])
def test_a_good_artifact_of_any_layers(llama: Supernet, tmp_path: Path, format_name: str) -> None:
    for i, plan in enumerate((plan_for(llama, "3x0.6"), plan_for(llama, "4x0.5", "adaptive"), bare_plan(llama))):
        write(materialize_subnet(llama, plan), tmp_path / str(i) / format_name, format_name, "fp32")
        report = verify_artifact(tmp_path / str(i), llama, plan)
        assert [found.format for found in report.formats] == [format_name]
        assert report.formats[0].dtype == "fp32"
        assert report.max_abs_diff < 1e-4
        assert report.max_rel_diff < 1e-5
        assert report.greedy_tokens_equal


def test_half_precision_has_its_own_tolerance(llama: Supernet, tmp_path: Path) -> None:
    plan = plan_for(llama, "3x0.6")
    write(materialize_subnet(llama, plan), tmp_path / "safetensors", dtype="bf16")
    (found,) = verify_artifact(tmp_path, llama, plan).formats
    assert found.dtype == "bf16"
    assert 1e-4 < found.distance.max_rel_diff < 8e-2


def test_both_formats_are_reported_and_the_worst_counts(llama: Supernet, tmp_path: Path) -> None:
    plan = plan_for(llama, "3x0.6")
    subnet = materialize_subnet(llama, plan)
    write(subnet, tmp_path / "safetensors", dtype="fp32")
    write(subnet, tmp_path / "onnx", "onnx", "fp32")
    report = verify_artifact(tmp_path, llama, plan)
    assert list(report.to_json()) == ["safetensors", "onnx"]
    assert report.max_abs_diff == max(found.distance.max_abs_diff for found in report.formats)


def test_what_is_quantized_has_a_divergence(llama: Supernet, tmp_path: Path) -> None:
    plan = plan_for(llama, "3x0.6")
    subnet = materialize_subnet(llama, plan)
    write(subnet, tmp_path / "safetensors", dtype="fp32")
    report = verify_artifact(tmp_path, llama, plan)
    assert report.mean_kl is None
    assert report.perplexity_ratio is None
    write(subnet, tmp_path / "onnx", "onnx", "int8")
    report = verify_artifact(tmp_path, llama, plan)
    quantized = report.formats[1].distance
    assert report.mean_kl == quantized.mean_kl > 0
    assert report.perplexity_ratio == quantized.perplexity_ratio


def test_one_wrong_weight_is_found(llama: Supernet, tmp_path: Path) -> None:
    plan = plan_for(llama, "3x0.6")
    path = write(materialize_subnet(llama, plan), tmp_path / "safetensors") / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][3] += 0.1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NumbersDiffer) as caught:
        verify_artifact(tmp_path, llama, plan)
    assert caught.value.what == (
        "The written files do not compute the same as the cut model: "
        "model.layers.1.mlp.down_proj.weight differs in 1 of 96 rows, by up to 0.1."
    )
    assert caught.value.where == str(tmp_path / "safetensors")
    assert caught.value.exit_code == 5


def test_nan_in_the_file_is_found(llama: Supernet, tmp_path: Path) -> None:
    plan = plan_for(llama, "3x0.6")
    path = write(materialize_subnet(llama, plan), tmp_path / "safetensors") / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NumbersDiffer, match=r"model\.norm\.weight differs in 1 of 96 values, by up to nan"):
        verify_artifact(tmp_path, llama, plan)


def test_another_plan_than_the_one_written_is_found(llama: Supernet, tmp_path: Path) -> None:
    write(materialize_subnet(llama, plan_for(llama, "3x0.6")), tmp_path / "safetensors")
    with pytest.raises(DamagedFile, match=r"and the plan keeps \["):
        verify_artifact(tmp_path, llama, plan_for(llama, "3x0.7"))


def test_a_folder_without_formats(llama: Supernet, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="A format to verify was not found"):
        verify_artifact(tmp_path, llama, plan_for(llama, "3x0.6"))


def test_caches_that_are_swapped_are_found(llama: Supernet, tmp_path: Path) -> None:
    """The prompt and its next token are right: only the logits of decode steps are not."""
    plan = plan_for(llama, "3x0.6")
    path = write(materialize_subnet(llama, plan), tmp_path / "onnx", "onnx", "fp32") / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    other = {f"present.{i}.{kind}": f"present.{1 - i}.{kind}" for i in (0, 1) for kind in ("key", "value")}
    for names in (model.graph.output, *(node.output for node in model.graph.node)):
        for i, named in enumerate(names):
            if isinstance(named, str):
                names[i] = other.get(named, named)
            else:
                named.name = other.get(named.name, named.name)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(NumbersDiffer, match="through the KV cache, logits differ by up to"):
        verify_artifact(tmp_path, llama, plan)
