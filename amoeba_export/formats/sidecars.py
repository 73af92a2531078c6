"""The files that make weights usable: tokenizer, chat template, generation config, licence, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from amoeba_export.ir import Subnet
from amoeba_export.load.sidecars import GENERATION_CONFIG, TOKENIZER_FILES
from amoeba_export.shown import as_code, for_markdown

_LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def tokenizer_folder(subnet: Subnet) -> Path:
    """Where the tokenizer of a cut model is."""
    return subnet.tokenizer_folder or subnet.source_folder


def copy_tokenizer(subnet: Subnet, folder: Path) -> None:
    """Copy the tokenizer and chat template, as far as there are any."""
    source = tokenizer_folder(subnet)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _settle(folder / "tokenizer_config.json")
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")


def _settle(path: Path) -> None:
    """Settings as every reader takes them.

    Without `auto_map`: the code that it names is not copied, or is another repository's, and nothing needs it. A class
    that transformers 5 alone knows gets the name that 4 and 5 know: older readers (GenAI before April 2026) refuse it.
    """
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    settled = {key: value for key, value in content.items() if key != "auto_map"}
    if settled.get("tokenizer_class") == "TokenizersBackend":
        settled["tokenizer_class"] = "PreTrainedTokenizerFast"
    if settled != content:
        path.write_text(json.dumps(settled, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_generation_config(source: Path, folder: Path) -> None:
    """Copy `generation_config.json`: end tokens and sampling defaults do not change with the shape."""
    if (source / GENERATION_CONFIG).is_file():
        shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)


def copy_license(source: Path, folder: Path) -> None:
    """Copy the licence of the supernet: the weights are still its authors'."""
    for pattern in _LICENSES:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_model_card(subnet: Subnet, folder: Path, *, needs_code: bool) -> None:
    """`README.md`: what the model is, how it was made, how to load it. The same for the same inputs."""
    plan, dense = subnet.plan, subnet.architecture
    base = dense.base
    units = base.units if base.expert_size else f"FFN {base.units}"
    call = 'AutoModelForCausalLM.from_pretrained("."' + (", trust_remote_code=True)" if needs_code else ")")
    rows = "\n".join(
        f"| {idx} | {layer.source_layer} | {dims.num_heads} | {dims.num_kv_heads} | {dims.ffn_size} |"
        for idx, (layer, dims) in enumerate(zip(plan.layers, dense.layers, strict=True))
    )
    code = (
        "No stock model type computes these layers: `modeling_amoeba.py` beside the weights runs them.\n\n"
        if needs_code
        else ""
    )
    text = f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [amoeba, pruned]
---

# {for_markdown(subnet.model_name)}, cut to {plan.shape}

A dense subnet of {as_code(subnet.model_name)}, made with amoeba: {len(dense.layers)} of {base.num_layers} layers,
{plan.policy} widths, {dense.num_params:,} weights. The licence of {as_code(subnet.model_name)} applies to them.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = {call}
tokenizer = AutoTokenizer.from_pretrained(".")
```

{code}The uncut model has {base.num_heads} query heads, {base.num_kv_heads} KV heads and {base.ffn_size} {units} in
each layer. This one has:

| layer | source layer | query heads | KV heads | {units} |
|---|---|---|---|---|
{rows}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
