"""Every command that works for a while, on tiny models, and what may be there when it was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from amoeba_export.artifact import verify_checksums
from amoeba_export.artifact.manifest import is_artifact
from amoeba_export.load import load_supernet, write_strategy
from tests.formats.bpe import save_bpe
from tests.materialize.subnets import noise_strategy
from tests.tiny import save_tiny

_RECIPE = """
[data]
file = "text.txt"
window = 16
samples = 8
heldout = 4
[depth]
max_removed = 2
[quality]
widths = [1.0, 0.5]
"""

_BUILD = """
[model]
path = "model"
[defaults]
strategy = "strategy.safetensors"
refit = "off"
[[build]]
name = "a"
shape = "3x0.5"
formats = ["onnx", "safetensors"]
[[build]]
name = "b"
shape = "4x1"
formats = ["gguf"]
"""


@dataclass(frozen=True)
class Scene:
    """A folder with a tiny model and what is needed to work on it; what is made goes to `made`."""

    root: Path

    @property
    def made(self) -> Path:
        return self.root / "dist"

    def left_behind(self) -> list[str]:
        """What is in the folder of results and is neither a whole result nor a documented way to go on."""
        if not self.made.exists():
            return []
        found = sorted(path.relative_to(self.made) for path in self.made.rglob("*"))
        strangers = [str(path) for path in found if any(part.startswith(".") for part in path.parts)]
        for path in sorted(self.made.iterdir()):
            if path.name.endswith(".training"):
                whole = any((path / "checkpoints").glob("step-*"))
            elif path.name == "adapter":
                whole = (path / "adapter_config.json").is_file() and (path / "training.jsonl").is_file()
            elif path.is_dir() and path.name != "logs":
                whole = is_artifact(path) and bool(verify_checksums(path))
            else:
                whole = True
            if not whole:
                strangers.append(str(path.relative_to(self.root)))
        return strangers


def make_scene(root: Path) -> Scene:
    """Write the inputs."""
    root.mkdir(parents=True, exist_ok=True)
    save_bpe(save_tiny(root / "model", "llama"))
    supernet = load_supernet(str(root / "model"))
    write_strategy(noise_strategy(supernet.architecture), root / "strategy.safetensors")
    lines = [f"{i * i} is the square of {i}, and {i * i * i} its cube." for i in range(400)]
    (root / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    (root / "recipe.toml").write_text(_RECIPE, encoding="utf-8")
    (root / "amoeba.toml").write_text(_BUILD, encoding="utf-8")
    return Scene(root)


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


_EXPORT = "export model --strategy strategy.safetensors --shape 3x0.5 --out"

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "export onnx": _words(f"{_EXPORT} dist/out --format onnx --refit off"),
    "export safetensors": _words(f"{_EXPORT} dist/out --format safetensors --refit off"),
    "export gguf": _words(f"{_EXPORT} dist/out --format gguf --refit fast --heal 4ktok"),
    "build": _words("build"),
    "calibrate": _words("calibrate model --recipe recipe.toml --out dist/found.safetensors"),
    "finetune": _words(
        "finetune model --strategy strategy.safetensors --data text.txt --out dist/adapter --max-steps 4"
        " --save-every 2 --batch-size 2 --gradient-accumulation 1 --max-length 32 --rank 2 --experts 2"
    ),
    "verify": _words("verify artifact --strategy strategy.safetensors"),
    "bench": _words("bench artifact --prompt 8 --generate 8 --rounds 2"),
    "profile": _words("profile model --target cpu --prompt 8 --generate 8 --out dist/costs.json"),
}
"""Words after `amoeba`, run in the scene's folder. `verify` and `bench` want what `ARTIFACT` makes.

The GGUF is refitted and healed, which takes most of the time of its export; nothing else is."""

ARTIFACT = _words(f"{_EXPORT} artifact --format onnx --refit off")
