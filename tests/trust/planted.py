"""Code in every place of a model or artifact from which some tool runs it. It leaves a mark wherever it runs."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

from amoeba_export.artifact import list_files, read_manifest
from amoeba_export.artifact.manifest import MANIFEST_NAME
from amoeba_export.artifact.provenance import PROVENANCE_NAME


def code(mark: Path) -> str:
    """Python that leaves `mark` when it is imported, and has every class that a config could ask for."""
    names = ("C", "M", "T", "AmoebaConfig", "AmoebaForCausalLM", "LlamaConfig", "LlamaForCausalLM")
    classes = "".join(f"class {name}: pass\n" for name in names)
    return f"open({str(mark)!r}, 'a').write(__file__ + '\\n')\n{classes}"


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.mark)!r}, 'a').write('pickle')",)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a missing one is made."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


def plant_everywhere(folder: Path, mark: Path, *, module: str = "evil") -> None:
    """Every place of a model folder: modules beside it, names in its settings, templates and pickles."""
    for name in ("evil", "modeling_amoeba", "modeling_llama", "tokenizer", "sitecustomize", "torch", "numpy", "json"):
        (folder / f"{name}.py").write_text(code(mark))
    kinds = {"AutoConfig": "C", "AutoModel": "M", "AutoModelForCausalLM": "M"}
    auto_map: dict[str, Any] = {kind: f"{module}.{name}" for kind, name in kinds.items()}
    tokenizer = {"AutoTokenizer": [f"{module}.T", f"{module}.T"]}
    edit(folder / "config.json", auto_map=auto_map | tokenizer, attn_implementation="somebody/kernel")
    escape = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    (folder / "chat_template.jinja").write_text(escape)
    edit(folder / "tokenizer_config.json", auto_map=tokenizer, chat_template=escape)
    edit(folder / "generation_config.json", custom_generate=f"{module}.generate", trust_remote_code=True)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(mark))
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))


def renew_checksums(artifact: Path) -> None:
    """What a hostile or careless tool does after it has changed an artifact: manifest and provenance agree again."""
    manifest = read_manifest(artifact)
    files = [file for file in list_files(artifact) if file.path not in (MANIFEST_NAME, PROVENANCE_NAME)]
    (artifact / PROVENANCE_NAME).write_text(manifest.provenance(files))
    files = [file for file in list_files(artifact) if file.path != MANIFEST_NAME]
    (artifact / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=tuple(files)).to_text())
