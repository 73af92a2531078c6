"""An adapter folder as peft writes it: `adapter_config.json`, with options that we compute, and the weight file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_export.errors import DamagedFile, NotFound, UnsupportedAdapter
from amoeba_export.ir import InputId, TensorSource
from amoeba_export.load.checkpoint import open_file
from amoeba_export.load.identity import model_identity
from amoeba_export.load.links import refuse_links_outside
from amoeba_export.load.unpickle import load_pickled_weights
from amoeba_export.reading import read_json_object
from amoeba_export.reading.bounds import MAX_FLOAT, MAX_SIZES, shown
from amoeba_export.reading.patterns import read_pattern

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base weights as they are."""

_SAYS_NOTHING = (
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size"),
    # peft too ignores fan_in_fan_out on torch.nn.Linear; these only say how training began, or how it was done.
    *("fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config"),
    *("lora_dtype", "autocast_adapter_dtype", "lorap_lr_ratio", "lorap_emb_lr", "runtime_config"),
    # What it ties is in the file: LoRA or weights of both.
    "ensure_weight_tying",
)
_READ = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)
_NAMES = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
"""A list of names each; the first three may be one text instead: a pattern, or a name."""

_BIASES = ("none", "all", "lora_only")
_READ_SMOL = ("use_moe_lora", "num_experts", "top_k", "width_choice")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What is known of an adapter before it is held against a model.

    Attributes:
        config: Its options, none of which would change the result in a way that we do not compute.
        path: The weight file.
        weights: What is in it, not read yet.
        input: What a manifest says of it.
    """

    config: Mapping[str, Any]
    path: Path
    weights: TensorSource
    input: InputId

    @property
    def is_smol(self) -> bool:
        """Whether it is a mixture of LoRAs with a gate."""
        return bool(self.config.get("use_moe_lora"))

    def by_pattern(self, key: str, module: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name (peft `get_pattern_key`)."""
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, dict):
            raise DamagedFile(self.path, f"its config has {key} = {shown(patterns)}, not a table")
        for pattern, value in patterns.items():
            try:
                ending = read_pattern(rf"(.*\.)?({pattern})$")
            except ValueError as error:
                raise DamagedFile(self.path, f"{key} has a pattern that is none: {shown(pattern)}: {error}") from error
            if ending.match(module):
                return value
        return default

    def count(self, key: str, value: Any) -> int:
        """What the config has at `key`, which must be a count. Raises `DamagedFile`."""
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZES["hidden_size"]:
            raise DamagedFile(self.path, f"its config has {key} = {shown(value)}")
        return value

    def alpha(self, value: Any) -> float:
        """The lora_alpha that the config has. Raises `DamagedFile`."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_FLOAT:
            raise DamagedFile(self.path, f"its config has lora_alpha = {shown(value)}")
        return float(value)

    def differences(self, name: str, expected: tuple[int, ...]) -> list[str]:
        """What to say when a weight has another shape than this model implies."""
        shape = self.weights.shape(name)
        return [] if shape == expected else [f"{name} has shape {list(shape)}, this model needs {list(expected)}"]


def open_adapter(folder: Path, *, cache_dir: Path) -> AdapterFile:
    """Open the adapter of a folder.

    Args:
        folder: Has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        cache_dir: Where digests are remembered.

    Raises:
        NotFound: A file is missing.
        LinkOutside: A file is a link out of the folder.
        DamagedFile: A file is truncated, or is not what its name says.
        UnsafePickle: A `.bin` file names something other than tensors.
        UnsupportedAdapter: It uses an option that cannot be merged, named.
    """
    if folder.is_dir():
        refuse_links_outside(folder)
    config = _read_config(folder / CONFIG)
    _check_options(config, is_smol=bool(config.get("use_moe_lora")), where=folder / CONFIG)
    path, weights = _open_weights(folder)
    content = {key: _in_any_order(value) for key, value in config.items()}
    sha256 = model_identity(content, [path], cache_dir=cache_dir)
    entry = InputId(role="adapter", id=folder.resolve().name, sha256=sha256)
    return AdapterFile(config=config, path=path, weights=weights, input=entry)


def _read_config(path: Path) -> dict[str, Any]:
    return read_json_object(
        path, what="The adapter's config", missing="Give a folder that peft's save_pretrained wrote."
    )


def _check_options(config: Mapping[str, Any], *, is_smol: bool, where: Path) -> None:
    """Refuse what would change the result in a way that we do not compute.

    peft adds options with every release and writes each of them into every config. One that we do not know is harmless
    while it is off: null, false, 0, empty, or made of nothing else.
    """
    if config.get("peft_type") != "LORA":
        raise UnsupportedAdapter(f"the method {config.get('peft_type')}", where=where)
    if config.get("bias", "none") not in _BIASES:
        raise DamagedFile(where, f"its bias is {config['bias']!r}, and can be {', '.join(_BIASES)}")
    if config.get("init_lora_weights", True) not in _INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights = {config['init_lora_weights']!r}, which changes the base weights", where=where
        )
    for key in _NAMES:
        names = config.get(key)
        if isinstance(names, str) and key != "modules_to_save":
            continue
        if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DamagedFile(where, f"its {key} is no list of names")
    known = _SAYS_NOTHING + _READ + (_READ_SMOL if is_smol else ())
    for key, value in config.items():
        if key not in known and not _is_off(value):
            raise UnsupportedAdapter(f"{key} = {value!r}", where=where)
        if is_smol and key in ("use_dora", "rank_pattern", "alpha_pattern") and value:
            raise UnsupportedAdapter(f"{key} together with a mixture of LoRAs", where=where)


def _is_off(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_off, value.values()))
    return all(map(_is_off, value)) if isinstance(value, list) else not value


def _open_weights(folder: Path) -> tuple[Path, TensorSource]:
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            return path, load_pickled_weights(path) if path.suffix == ".bin" else open_file(path)
    raise NotFound(
        "The adapter's weight file", folder / WEIGHTS[0], next_step="Give a folder that peft's save_pretrained wrote."
    )


def _in_any_order(value: Any) -> Any:
    """Lists of names are sets to peft, which writes them in any order."""
    if not isinstance(value, list):
        return value
    try:
        return sorted(value)
    except TypeError:  # of several types: no list of names
        return value
