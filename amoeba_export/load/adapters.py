"""An adapter in a model: held against it, opened as plain LoRA or as a mixture with a gate (SMoL), and added."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from amoeba_export.errors import UnsupportedAdapter
from amoeba_export.ir import SILENT, Adapter, Progress, Supernet
from amoeba_export.load.adapter_folder import AdapterFile, open_adapter
from amoeba_export.load.adapter_names import AdapterWeights, sort_weights
from amoeba_export.load.experts import refuse_experts
from amoeba_export.load.families import expected_weights, matrix_shapes
from amoeba_export.load.fused import parts_of, stored_shapes
from amoeba_export.load.fused_adapters import with_split_modules, with_split_weights
from amoeba_export.load.lora import LoraAdapter, check_biases, check_targets
from amoeba_export.load.own_weights import possible_weights, with_own_weights
from amoeba_export.load.sidecars import check_sidecars
from amoeba_export.load.smol import GATE_WEIGHTS, SmolAdapter
from amoeba_export.model.tokenizer import has_tokenizer


def add_adapter(supernet: Supernet, folder: Path, *, cache_dir: Path, progress: Progress = SILENT) -> Supernet:
    """`supernet` with the adapter of a folder, checked against it.

    LoRA is merged later, when a subnet is cut, and no weight of it is read here. Weights that the adapter brings whole
    take the place of the model's at once; where these are the embedding and a tied head, they are compared.

    Args:
        supernet: With the adapters that come before this one.
        folder: Has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), and a tokenizer of its own where
            it changes the size of the vocabulary.
        cache_dir: Where digests are remembered.
        progress: Told when the model is no longer what its config says.

    Raises:
        NotFound: A file is missing.
        LinkOutside: A file is a link out of the folder.
        DamagedFile: A file is truncated, or is not what its name says.
        UnsafePickle: A `.bin` file names something other than tensors.
        WrongModel: It was made for a model of other dims.
        UnsupportedAdapter: It uses an option that cannot be merged, named.
    """
    file = open_adapter(folder, cache_dir=cache_dir)
    path, family, architecture = file.path, supernet.family, supernet.architecture
    names = [name for name in file.weights.names() if not (file.is_smol and name in GATE_WEIGHTS)]
    refuse_experts(names, family, path)
    possible = possible_weights(family, architecture)
    parts = parts_of(family, possible, architecture.num_layers)
    fused = {name: shape for name, shape in stored_shapes(possible, parts).items() if name not in possible}
    named = sort_weights(names, {**possible, **fused}, path)
    weights, source = with_split_weights(named, file.weights, parts, fused, path)
    _check_own(weights, supernet, file)
    file = dataclasses.replace(file, weights=source)
    supernet = with_own_weights(supernet, weights, source, where=path, progress=progress)
    matrices = matrix_shapes(supernet.family, supernet.architecture)
    matrices |= {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in fused.items()}
    check_targets(file, named, matrices)
    check_biases(file, weights, expected_weights(supernet.family, supernet.architecture))
    adapter = with_split_modules(_opened(file, weights, matrices, architecture.num_layers), parts, path)
    if supernet.architecture.vocab_size != architecture.vocab_size:
        supernet = _with_tokenizer(supernet, folder, architecture.vocab_size, progress)
    return dataclasses.replace(supernet, adapters=(*supernet.adapters, adapter), inputs=(*supernet.inputs, file.input))


def _opened(
    file: AdapterFile, weights: AdapterWeights, matrices: dict[str, tuple[int, int]], num_layers: int
) -> Adapter:
    if file.is_smol:
        return SmolAdapter.open(file, weights.lora, matrices, num_layers)
    return LoraAdapter.open(file, weights.lora, matrices)


def _with_tokenizer(supernet: Supernet, folder: Path, num_words: int, progress: Progress) -> Supernet:
    resized = f"{folder.name} changes the vocabulary from {num_words} to {supernet.architecture.vocab_size} tokens"
    if not has_tokenizer(folder):
        progress.warn(f"The adapter {resized} but has no tokenizer: the model's own is written, without new tokens.")
        return supernet
    check_sidecars(folder)
    progress.note(f"The adapter {resized}: its tokenizer is written.")
    return dataclasses.replace(supernet, tokenizer_folder=folder)


def _check_own(weights: AdapterWeights, supernet: Supernet, file: AdapterFile) -> None:
    """Raise where whole weights and LoRA of this or an earlier adapter do not go together."""
    if file.is_smol and weights.own:
        raise UnsupportedAdapter(f"{min(weights.own)} together with a mixture of LoRAs", where=file.path)
    replaced = {name.removesuffix(".weight") for name in weights.own}
    for earlier in supernet.adapters:
        if both := sorted(replaced & set(earlier.modules())):
            raise UnsupportedAdapter(f"a whole weight of {both[0]}, which {earlier.input.id} changes", where=file.path)
