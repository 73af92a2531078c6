"""Checkpoints that bitsandbytes quantized: read without it, compared with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoeba_export.errors import DamagedFile, UnsupportedError
from amoeba_export.ir import SubnetPlan
from amoeba_export.load import load_supernet
from amoeba_export.materialize import materialize_subnet
from amoeba_export.verify import masked_logits
from tests.tiny import save_tiny

KINDS = ("nf4", "nf4-nested", "fp4", "int8")
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
FP4 = [0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25, -0.0, -0.0052, -0.6667, -1.0, -0.3333, -0.5, -0.1667, -0.25]
BLOCK = 64
DOWN = "model.layers.0.mlp.down_proj.weight"


def quantize(name: str, weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one weight in the layout of bitsandbytes, and what they stand for."""
    if kind == "int8":
        scale_O = weight.abs().amax(1)
        steps = (weight / scale_O[:, None] * 127).round()
        tensors = {name: steps.to(torch.int8), name.replace(".weight", ".SCB"): scale_O}
        tensors[name + "_format"] = torch.tensor(0, dtype=torch.uint8)
        return tensors, steps * scale_O[:, None] / 127
    table = torch.tensor(FP4 if kind == "fp4" else NF4)
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    facts: dict[str, object] = {"quant_type": kind[:3], "blocksize": BLOCK, "dtype": "float32"}
    facts["shape"] = list(weight.shape)
    tensors = {f"{name}.quant_map": table, f"{name}.absmax": absmax}
    if kind == "nf4-nested":
        offset, levels = absmax.mean(), torch.linspace(-1, 1, 256)
        groups = [group.abs().max() for group in (absmax - offset).split(256)]
        nested_absmax = torch.stack(groups)
        scaled = (absmax - offset) / nested_absmax.repeat_interleave(256)[: absmax.numel()]
        codes = (scaled[:, None] - levels).abs().argmin(1).to(torch.uint8)
        absmax = levels[codes.int()] * nested_absmax.repeat_interleave(256)[: absmax.numel()] + offset
        tensors[f"{name}.absmax"] = codes
        tensors[f"{name}.nested_absmax"] = nested_absmax
        tensors[f"{name}.nested_quant_map"] = levels
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    codes = (blocks[..., None] / absmax[:, None, None] - table).abs().argmin(-1).to(torch.uint8).reshape(-1)
    tensors[name] = (codes[0::2] << 4 | codes[1::2])[:, None]
    state = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__{kind[:3]}"] = state
    return tensors, (table[codes.int()].view(-1, BLOCK) * absmax[:, None]).view(weight.shape)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantized checkpoint, and the plain one of the same values."""
    root = tmp_path_factory.mktemp(request.param)
    plain = save_tiny(root / "plain")
    weights = load_file(plain / "model.safetensors")
    quantized, values = {}, {}
    for name, weight in weights.items():
        if "_proj" in name:
            tensors, values[name] = quantize(name, weight, request.param)
            quantized |= tensors
        else:
            quantized[name] = values[name] = weight
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    packed = shutil.copytree(plain, root / "packed")
    save_file(quantized, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": request.param != "int8"}
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return packed, plain


def test_every_weight_is_what_it_stands_for(pair: tuple[Path, Path]) -> None:
    packed, plain = (load_supernet(str(folder)).tensors for folder in pair)
    assert set(packed.names()) == set(plain.names())
    for name in plain.names():
        assert packed.shape(name) == plain.shape(name)
        assert packed.dtype(name) == torch.float32
        torch.testing.assert_close(packed.read(name), plain.read(name), rtol=1e-6, atol=1e-7)


def test_a_subnet_of_it_is_a_plain_model(pair: tuple[Path, Path]) -> None:
    packed, plain = (load_supernet(str(folder)) for folder in pair)
    plan = SubnetPlan.full(packed.architecture)
    assert "quantization_config" not in packed.architecture.config
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(masked_logits(packed, plan, ids), masked_logits(plain, plan, ids), rtol=1e-4, atol=1e-5)
    for (name, weight), (_, same) in zip(
        materialize_subnet(packed, plan).stream(), materialize_subnet(plain, plan).stream(), strict=True
    ):
        torch.testing.assert_close(weight, same, rtol=1e-6, atol=1e-7, msg=name)


def test_the_difference_is_named(pair: tuple[Path, Path]) -> None:
    class Notes:
        def __init__(self) -> None:
            self.said: list[str] = []

        def note(self, text: str) -> None:
            self.said.append(text)

        def track(self, *args: object) -> object:
            from amoeba_export.ir import SILENT

            return SILENT.track(*args)  # type: ignore[arg-type]

    notes = Notes()
    load_supernet(str(pair[0]), progress=notes)  # type: ignore[arg-type]
    assert notes.said == [
        "packed is quantized (bitsandbytes); its weights are dequantized as they are read. Subnets are cut from "
        "these, and compared with them: they differ from the weights before quantization by its rounding. An adapter "
        "trained on the quantized model is merged into the dequantized one."
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
)
def test_the_library_means_the_same(settings: dict[str, object], tmp_path: Path) -> None:
    """What transformers and bitsandbytes save themselves, against what bitsandbytes makes of it.

    Of a weight of 64 columns: at 96, no multiple of its block, its CPU kernels are wrong.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path / "source", "mistral"), quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "saved")
    linear = model.model.layers[0].mlp.gate_proj
    if "load_in_8bit" in settings:
        expected = bitsandbytes.functional.int8_vectorwise_dequant(linear.weight.CB, linear.weight.SCB)
    else:
        expected = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    read = load_supernet(str(tmp_path / "saved")).tensors.read(DOWN.replace("down", "gate"))
    assert read.dtype == torch.bfloat16
    torch.testing.assert_close(read, expected.to(torch.bfloat16), rtol=2**-7, atol=2**-6)


def damage(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    weights = load_file(folder / "model.safetensors")
    assert name in weights
    save_file({**weights, name: tensor}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("pair", ["nf4"], indirect=True)
def test_parts_that_do_not_fit_are_a_damaged_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = damage(shutil.copytree(pair[0], tmp_path / "short"), f"{DOWN}.absmax", torch.ones(7))
    with pytest.raises(DamagedFile, match=r"down_proj\.weight cannot be dequantized"):
        load_supernet(str(folder)).tensors.read(DOWN)


@pytest.mark.parametrize("pair", ["nf4"], indirect=True)
def test_a_state_that_is_none_is_a_damaged_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    name = f"{DOWN}.quant_state.bitsandbytes__nf4"
    folder = damage(shutil.copytree(pair[0], tmp_path / "state"), name, torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(DamagedFile, match="the quantization state of"):
        load_supernet(str(folder))


@pytest.mark.parametrize("pair", ["int8"], indirect=True)
def test_integers_without_scales_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(pair[0], tmp_path / "bare")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(DOWN.replace(".weight", ".SCB"))}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError) as caught:
        load_supernet(str(folder))
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "compressed-tensors"])
def test_other_quantizations_are_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method}}), encoding="utf-8"
    )
    with pytest.raises(UnsupportedError) as caught:
        load_supernet(str(folder))
    assert (caught.value.exit_code, str(caught.value)) == (
        7,
        f"This checkpoint is quantized ({method}); its weights cannot be cut as they are.\n"
        f"  where: {folder / 'config.json'}\n"
        "  next:  Give the checkpoint that it was quantized from, in fp32, fp16 or bf16.",
    )
