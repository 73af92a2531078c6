"""A GGUF file opened again: read and computed as llama.cpp does, from the file's own header and nothing else.

Logits come from a plain torch forward pass over the dequantized tensors that follows the graphs of llama.cpp
(`src/models/{llama,deci,qwen2,qwen3}.cpp`), oddities included: which biases an architecture ignores, pairs or halves in
RoPE, what happens to a layer without attention or FFN. Greedy tokens come from llama.cpp itself where the package
`xllamacpp` is installed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import torch
from torch.nn import functional

from amoeba_export import llama_cpp
from amoeba_export.errors import DamagedFile
from amoeba_export.verify.opened import Continuation, Past, Rope

_FILE_TYPES = {
    gguf.LlamaFileType.ALL_F32: "fp32",
    gguf.LlamaFileType.MOSTLY_F16: "fp16",
    gguf.LlamaFileType.MOSTLY_BF16: "bf16",
    gguf.LlamaFileType.MOSTLY_Q8_0: "int8",
    gguf.LlamaFileType.MOSTLY_Q6_K: "q6_k",
    gguf.LlamaFileType.MOSTLY_Q5_K_M: "q5_k_m",
    gguf.LlamaFileType.MOSTLY_Q4_K_M: "q4_k_m",
    gguf.LlamaFileType.MOSTLY_Q4_0: "int4",
}
_BIASES = {
    "llama": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "deci": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    "qwen2": ("attn_q", "attn_k", "attn_v"),
    "qwen3": (),
}
"""The biases that each architecture reads. llama.cpp refuses a file with a tensor that nobody reads."""

_YARN_TURNS = (32.0, 1.0)
"""llama.cpp does not read the file's `yarn_beta_fast` and `yarn_beta_slow` in these architectures."""

KEPT_BYTES = 4 << 30
"""Dequantized tensors are kept for the next pass up to this size, and made again beyond it."""


class OpenedGguf:
    """`model.gguf`, see the module's docstring.

    Raises:
        DamagedFile: It has an architecture or a tensor that llama.cpp would not read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "model.gguf"
        reader = gguf.GGUFReader(self._path)
        self._fields = {name: field.contents() for name, field in reader.fields.items() if "tokenizer" not in name}
        self._arch = str(self._fields["general.architecture"])
        if self._arch not in _BIASES:
            raise DamagedFile(self._path, f"its architecture is {self._arch}")
        self._tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        self.dtype = _FILE_TYPES[gguf.LlamaFileType(self._fields["general.file_type"])]
        self._has_tokenizer = reader.fields["tokenizer.ggml.model"].contents() != "none"
        self._unread = set(self._tensors)
        size = sum(int(tensor.n_elements) * 4 for tensor in self._tensors.values())
        self._read = functools.cache(self._dequantized) if size <= KEPT_BYTES else self._dequantized

    def _key(self, name: str, default: Any = None) -> Any:
        return self._fields.get(f"{self._arch}.{name}", default)

    def _dequantized(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        self._unread.discard(name)
        # GGUF lists the fastest axis first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shape)

    def _linear(self, x: torch.Tensor, layer: int, name: str) -> torch.Tensor:
        prefix = f"blk.{layer}.{name}"
        bias = None
        if name in _BIASES[self._arch] and f"{prefix}.bias" in self._tensors:
            bias = self._read(f"{prefix}.bias")
        return functional.linear(x, self._read(f"{prefix}.weight"), bias)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self._key("attention.layer_norm_rms_epsilon")
        return functional.rms_norm(x, x.shape[-1:], self._read(f"{name}.weight"), eps)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        x_TD = self._read("token_embd.weight")[input_ids[0]]
        for layer in range(self._key("block_count")):
            x_TD = self._layer(x_TD, layer)
        x_TD = self._norm(x_TD, "output_norm")
        output = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        logits_TV = functional.linear(x_TD, self._read(output))
        if self._unread:
            raise DamagedFile(self._path, f"llama.cpp does not read {', '.join(sorted(self._unread)[:3])}")
        return logits_TV[None]

    def _of_layer(self, name: str, layer: int) -> int:
        value = self._key(name)
        return int(value[layer] if isinstance(value, list) else value)

    def _layer(self, x_TD: torch.Tensor, layer: int) -> torch.Tensor:
        if self._of_layer("attention.head_count", layer):
            attended_TD = x_TD + self._attention(self._norm(x_TD, f"blk.{layer}.attn_norm"), layer)
        else:
            attended_TD = x_TD
        if not self._of_layer("feed_forward_length", layer):
            return x_TD  # as `deci` does: without its attention
        normed_TD = self._norm(attended_TD, f"blk.{layer}.ffn_norm")
        gate_TF = functional.silu(self._linear(normed_TD, layer, "ffn_gate"))
        return attended_TD + self._linear(gate_TF * self._linear(normed_TD, layer, "ffn_up"), layer, "ffn_down")

    def _attention(self, x_TD: torch.Tensor, layer: int) -> torch.Tensor:
        head_dim, length = self._key("attention.key_length"), x_TD.shape[0]
        q_NTH, k_KTH, v_KTH = (
            self._linear(x_TD, layer, name).view(length, -1, head_dim).transpose(0, 1)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        if self._arch == "qwen3":
            q_NTH = self._norm(q_NTH, f"blk.{layer}.attn_q_norm")
            k_KTH = self._norm(k_KTH, f"blk.{layer}.attn_k_norm")
        heads_per_kv = q_NTH.shape[0] // k_KTH.shape[0]
        mixed_NTH = functional.scaled_dot_product_attention(
            self._rotate(q_NTH),
            self._rotate(k_KTH).repeat_interleave(heads_per_kv, dim=0),
            v_KTH.repeat_interleave(heads_per_kv, dim=0),
            is_causal=True,
        )
        return self._linear(mixed_NTH.transpose(0, 1).reshape(length, -1), layer, "attn_output")

    def _rotate(self, x_NTH: torch.Tensor) -> torch.Tensor:
        angles_TH = self._angles(x_NTH.shape[1])
        cos, sin = angles_TH.cos() * self._magnitude(), angles_TH.sin() * self._magnitude()
        if self._arch in ("llama", "deci"):
            even, odd = x_NTH[..., 0::2], x_NTH[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        first, second = x_NTH.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def _angles(self, length: int) -> torch.Tensor:
        """Angle of each position and frequency [T, head_dim / 2]."""
        size = self._key("rope.dimension_count")
        base = self._key("rope.freq_base")
        frequencies: torch.Tensor = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        scaling, factor = self._key("rope.scaling.type"), self._key("rope.scaling.factor", 1.0)
        if scaling == "linear":
            frequencies = frequencies / factor
        elif scaling == "yarn":
            frequencies = _yarn(frequencies, size, base, factor, self._fields, self._arch)
        if "rope_freqs.weight" in self._tensors:
            frequencies = frequencies / self._read("rope_freqs.weight")
        angles: torch.Tensor = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        return angles

    def _magnitude(self) -> float:
        if self._key("rope.scaling.type") != "yarn":
            return 1.0
        factor, own = self._key("rope.scaling.factor"), self._key("rope.scaling.attn_factor", 1.0)
        return float(own * (1 + 0.1 * torch.tensor(factor).clamp(min=1.0).log()))

    def exact(self, rope: Rope) -> OpenedGguf:
        """See `Opened`: dequantized, it computes in fp32."""
        return self

    def with_past(self, past: Past, input_ids: torch.Tensor) -> None:
        """See `Opened`: whole passes have no cache."""

    def padded(self, input_ids: torch.Tensor) -> None:
        """See `Opened`."""

    def rope(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Opened`: of the header."""
        angles_TH = self._angles(num_positions)
        return angles_TH.cos() * self._magnitude(), angles_TH.sin() * self._magnitude()

    def continued(self, prompt: torch.Tensor, num_tokens: int) -> Continuation:
        """See `Opened`. llama.cpp stops at an end token, so there may be fewer. Without it, whole passes."""
        return Continuation(self.logits(prompt), tuple(self._greedy(prompt, num_tokens)), steps=None)

    def _greedy(self, prompt: torch.Tensor, num_tokens: int) -> list[int]:
        if self._has_tokenizer and llama_cpp.is_installed():
            return _llama_cpp_greedy(self._path, prompt, num_tokens)
        tokens: list[int] = []
        for _ in range(num_tokens):
            sequence = torch.cat([prompt, torch.tensor([tokens], dtype=prompt.dtype)], dim=1)
            tokens.append(int(self.logits(sequence)[0, -1].argmax()))
        return tokens


def _yarn(
    frequencies: torch.Tensor, size: int, base: float, factor: float, fields: dict[str, Any], arch: str
) -> torch.Tensor:
    """Frequencies that turn less than once in the original context are divided, those of 32 turns and more kept."""
    context = fields[f"{arch}.rope.scaling.original_context_length"]
    waves = torch.tensor([context / (2 * torch.pi * turn) for turn in _YARN_TURNS])
    log = torch.log(waves) / torch.log(torch.tensor(base))
    low, high = float((size * log[0] / 2).floor().clamp(min=0)), float((size * log[1] / 2).ceil().clamp(max=size - 1))
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp


def _llama_cpp_greedy(path: Path, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """Tokens as llama.cpp decodes them, through its cache in fp32."""
    body = {"prompt": prompt[0].tolist(), "n_predict": num_tokens, "temperature": -1.0, "return_tokens": True}
    (answer,) = llama_cpp.ask(path, [("completion", body)], context_tokens=prompt.shape[1] + num_tokens + 8)
    return [int(token) for token in answer["tokens"]]
