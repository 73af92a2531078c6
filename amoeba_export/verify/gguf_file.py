"""A GGUF file opened again: read and computed as llama.cpp does, from the file's own header and nothing else.

Logits come from a plain torch forward pass over the dequantized tensors that follows the graphs of llama.cpp
(`src/models/*.cpp`), oddities included: which biases an architecture ignores, pairs or halves in RoPE, what happens to
a layer without attention or FFN. Greedy tokens come from llama.cpp itself where the package `xllamacpp` is installed.

Long on purpose: one forward pass, read beside the graphs that it follows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch.nn import functional

from amoeba_export import llama_cpp
from amoeba_export.errors import DamagedFile
from amoeba_export.llama_cpp.architectures import ARCHITECTURES, has_window, rotates, score_scale
from amoeba_export.verify.loaded import side_by_side
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
_YARN_TURNS = (32.0, 1.0)
"""llama.cpp does not read the file's `yarn_beta_fast` and `yarn_beta_slow` in these architectures."""

_SMALLEST_CONTEXT = 256
"""llama.cpp makes a shorter context so long."""

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
        arch = str(self._fields["general.architecture"])
        if arch not in ARCHITECTURES:
            raise DamagedFile(self._path, f"its architecture is {arch}")
        self._arch = ARCHITECTURES[arch]
        self._tensors = {str(tensor.name): tensor for tensor in reader.tensors}
        self.dtype = _FILE_TYPES[gguf.LlamaFileType(self._fields["general.file_type"])]
        self._has_tokenizer = reader.fields["tokenizer.ggml.model"].contents() != "none"
        self._unread = set(self._tensors)
        size = sum(int(tensor.n_elements) * 4 for tensor in self._tensors.values())
        self._read = functools.cache(self._dequantized) if size <= KEPT_BYTES else self._dequantized
        self._num_layers = int(self._key("block_count"))

    def _key(self, name: str, default: Any = None) -> Any:
        return self._fields.get(f"{self._arch.name}.{name}", default)

    def _dequantized(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        self._unread.discard(name)
        # GGUF lists the fastest axis first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(shape)

    def _linear(self, x: torch.Tensor, layer: int, name: str, role: str) -> torch.Tensor:
        prefix = f"blk.{layer}.{name}"
        bias = None
        if role in self._arch.biases and f"{prefix}.bias" in self._tensors:
            bias = self._read(f"{prefix}.bias")
        return functional.linear(x, self._read(f"{prefix}.weight"), bias)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        eps = self._key("attention.layer_norm_rms_epsilon")
        return functional.rms_norm(x, x.shape[-1:], self._read(f"{name}.weight"), eps)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See `Opened`."""
        x_TD = self._read("token_embd.weight")[input_ids[0]]
        scales = "embedding_scale" in self._arch.always
        x_TD = x_TD * (x_TD.shape[1] ** 0.5 if scales else self._key("embedding_scale", 0.0) or 1.0)
        for layer in range(self._num_layers):
            x_TD = self._layer(x_TD, layer)
        x_TD = self._norm(x_TD, "output_norm")
        output = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        logits_TV = functional.linear(x_TD, self._read(output))
        if "logits_divisor" in self._arch.computes:
            logits_TV = logits_TV / self._key("logit_scale")
        logits_TV = _capped(logits_TV, self._cap("final_logit_softcapping", 30.0))
        if self._unread:
            raise DamagedFile(self._path, f"llama.cpp does not read {', '.join(sorted(self._unread)[:3])}")
        return logits_TV[None]

    def _cap(self, key: str, default: float) -> float:
        """A soft cap, 0 for none: where an architecture always has one, a file may say another."""
        caps = "attention_softcap" in self._arch.always
        return float(self._key(key, default if caps else 0.0)) if "final_softcap" in self._arch.computes else 0.0

    def _of_layer(self, name: str, layer: int) -> int:
        value = self._key(name)
        return int(value[layer] if isinstance(value, list) else value)

    def _layer(self, x_TD: torch.Tensor, layer: int) -> torch.Tensor:
        scale = self._key("residual_scale", 0.0) or 1.0
        attended_TD = x_TD
        if self._of_layer("attention.head_count", layer):
            made_TD = self._attention(self._entering(x_TD, f"blk.{layer}.attn_norm"), layer)
            if "output_norms" in self._arch.always:
                made_TD = self._norm(made_TD, f"blk.{layer}.post_attention_norm")
            attended_TD = x_TD + scale * made_TD
        if not self._of_layer("feed_forward_length", layer):
            return x_TD  # as `deci` does: without its attention
        made_TD = self._ffn(self._entering(attended_TD, f"blk.{layer}.ffn_norm"), layer)
        if "output_norms" in self._arch.always:
            made_TD = self._norm(made_TD, f"blk.{layer}.post_ffw_norm")
        return attended_TD + scale * made_TD

    def _entering(self, x_TD: torch.Tensor, norm: str) -> torch.Tensor:
        """What a block reads."""
        return x_TD if "no_input_norms" in self._arch.always else self._norm(x_TD, norm)

    def _ffn(self, x_TD: torch.Tensor, layer: int) -> torch.Tensor:
        if "experts" in self._arch.always:
            return self._experts(x_TD, layer)
        if self._arch.fused:
            gate_TF, up_TF = self._linear(x_TD, layer, "ffn_up", "up").chunk(2, dim=-1)
        else:
            gate_TF = self._linear(x_TD, layer, "ffn_gate", "gate")
            up_TF = self._linear(x_TD, layer, "ffn_up", "up")
        if "activation" in self._arch.always:
            gate_TF = functional.gelu(gate_TF, approximate="tanh")
        else:
            gate_TF = functional.silu(gate_TF)
        return self._linear(gate_TF * up_TF, layer, "ffn_down", "down")

    def _experts(self, x_TD: torch.Tensor, layer: int) -> torch.Tensor:
        """The best experts of each token, whose shares are scaled to a sum of 1."""
        gate_EFD, up_EFD, down_EDF = (
            self._read(f"blk.{layer}.ffn_{name}_exps.weight") for name in ("gate", "up", "down")
        )
        share_TE = self._linear(x_TD, layer, "ffn_gate_inp", "router").softmax(-1)
        best_TK = share_TE.topk(self._key("expert_used_count"), dim=-1).indices
        share_TE = torch.zeros_like(share_TE).scatter(1, best_TK, share_TE.gather(1, best_TK))
        share_TE = share_TE / share_TE.sum(-1, keepdim=True)
        made_TD = torch.zeros_like(x_TD)
        for expert in range(self._key("expert_count")):
            inner_TF = functional.silu(x_TD @ gate_EFD[expert].T) * (x_TD @ up_EFD[expert].T)
            made_TD = made_TD + share_TE[:, expert, None] * (inner_TF @ down_EDF[expert].T)
        return made_TD

    def _projected(self, x_TD: torch.Tensor, layer: int, head_dim: int) -> Iterator[torch.Tensor]:
        """q, k and v by heads."""
        if self._arch.fused:
            kv = self._of_layer("attention.head_count_kv", layer) * head_dim
            flat = self._linear(x_TD, layer, "attn_qkv", "q")
            parts = torch.split(flat, [flat.shape[1] - 2 * kv, kv, kv], dim=1)
        else:
            parts = tuple(self._linear(x_TD, layer, f"attn_{role}", role) for role in "qkv")
        if "whole_qk_norm" in self._arch.always:
            normed = (
                self._norm(part, f"blk.{layer}.attn_{role}_norm") for part, role in zip(parts, "qk", strict=False)
            )
            parts = (*normed, parts[2])
        for part in parts:
            yield part.view(x_TD.shape[0], -1, head_dim).transpose(0, 1)

    def _attention(self, x_TD: torch.Tensor, layer: int) -> torch.Tensor:
        head_dim, length = self._key("attention.key_length"), x_TD.shape[0]
        q_NTH, k_KTH, v_KTH = self._projected(x_TD, layer, head_dim)
        if self._arch.qk_norm and "whole_qk_norm" not in self._arch.always:
            q_NTH = self._norm(q_NTH, f"blk.{layer}.attn_q_norm")
            k_KTH = self._norm(k_KTH, f"blk.{layer}.attn_k_norm")
        if rotates(self._arch, layer):
            cos, sin = self._turns(length, local=self._is_local(layer))
            q_NTH, k_KTH = self._rotate(q_NTH, cos, sin), self._rotate(k_KTH, cos, sin)
        if beta := self._key("attention.temperature_scale", 0.0):
            wholes_T = torch.arange(length) // self._key("rope.scaling.original_context_length")
            q_NTH = q_NTH * (1 + beta * torch.log(wholes_T + 1.0))[:, None]
        heads_per_kv = q_NTH.shape[0] // k_KTH.shape[0]
        scores_NTT = q_NTH @ k_KTH.repeat_interleave(heads_per_kv, dim=0).transpose(1, 2) * self._score_scale(head_dim)
        scores_NTT = _capped(scores_NTT, self._cap("attn_logit_softcapping", 50.0) if not self._arch.qk_norm else 0.0)
        age_TT = torch.arange(length)[:, None] - torch.arange(length)
        hidden_TT = age_TT < 0
        if self._is_local(layer):
            hidden_TT |= age_TT >= self._window()
        weights_NTT = scores_NTT.masked_fill(hidden_TT, float("-inf")).softmax(-1)
        mixed_NTH = weights_NTT @ v_KTH.repeat_interleave(heads_per_kv, dim=0)
        return self._linear(mixed_NTH.transpose(0, 1).reshape(length, -1), layer, "attn_output", "o")

    def _score_scale(self, head_dim: int) -> float:
        if "logits_divisor" in self._arch.computes and (scale := self._key("attention.scale", 0.0)):
            return float(scale)
        heads = self._of_layer("attention.head_count", 0)
        return score_scale(self._arch, self._num_layers, self._key("embedding_length"), heads, head_dim)

    def _is_local(self, layer: int) -> bool:
        """Whether a layer attends through a window."""
        if self._arch.kinds != "listed" or not self._window():
            return False
        return has_window(self._arch, layer, self._key("attention.sliding_window_pattern"))

    def _window(self) -> int:
        return int(self._key("attention.sliding_window", self._arch.window))

    def _rotate(self, x_NTH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned, rest = x_NTH[..., : 2 * cos.shape[-1]], x_NTH[..., 2 * cos.shape[-1] :]
        if self._arch.in_pairs:
            even, odd = turned[..., 0::2], turned[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        first, second = turned.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def _turns(self, length: int, *, local: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a text's positions [T, R / 2], with their magnitude."""
        angles_TH = self._angles(length, local=local)
        magnitude = 1.0 if local and self._key("rope.scaling.type") == "yarn" else self._magnitude()
        return angles_TH.cos() * magnitude, angles_TH.sin() * magnitude

    def _angles(self, length: int, *, local: bool) -> torch.Tensor:
        """Angle of each position and frequency [T, R / 2]."""
        size = self._key("rope.dimension_count")
        base = self._key("rope.freq_base")
        if local and not self._arch.one_base:
            base = self._key("rope.freq_base_swa", self._arch.local_base or base)
        frequencies: torch.Tensor = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        scaling, factor = self._key("rope.scaling.type"), self._key("rope.scaling.factor", 1.0)
        if scaling == "linear" and not local:
            frequencies = frequencies / factor
        elif scaling == "yarn" and not local:
            frequencies = _yarn(frequencies, size, base, factor, self._fields, self._arch.name)
        elif scaling == "longrope":
            is_long = length > self._key("rope.scaling.original_context_length")
            which = "rope_factors_long.weight" if is_long else "rope_factors_short.weight"
            self._unread -= {"rope_factors_long.weight", "rope_factors_short.weight"}
            frequencies = frequencies / self._read(which)
        if "rope_freqs.weight" in self._tensors:
            frequencies = frequencies / self._read("rope_freqs.weight")
        angles: torch.Tensor = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        return angles

    def _magnitude(self) -> float:
        own = float(self._key("rope.scaling.attn_factor", 1.0))
        if self._key("rope.scaling.type") != "yarn":
            return own if self._key("rope.scaling.type") == "longrope" else 1.0
        factor = self._key("rope.scaling.factor")
        return float(own * (1 + 0.1 * torch.tensor(factor).clamp(min=1.0).log()))

    def exact(self, rope: Rope) -> OpenedGguf:
        """See `Opened`: dequantized, it computes in fp32."""
        return self

    def with_past(self, past: Past, input_ids: torch.Tensor) -> None:
        """See `Opened`: whole passes have no cache."""

    def padded(self, input_ids: torch.Tensor) -> None:
        """See `Opened`."""

    def rope(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Opened`: of the header. Of layers without a window before those with one, where they differ."""
        sides = sorted({self._is_local(layer) for layer in range(self._num_layers)})
        cos, sin = side_by_side([self._turns(num_positions, local=local) for local in sides])
        if self._key("rope.scaling.type") == "longrope":
            short = self._turns(min(self._key("rope.scaling.original_context_length"), num_positions))
            cos, sin = torch.cat([short[0], cos]), torch.cat([short[1], sin])
        return cos, sin

    def continued(self, prompt: torch.Tensor, num_tokens: int) -> Continuation:
        """See `Opened`. llama.cpp stops at an end token, so there may be fewer. Without it, whole passes."""
        return Continuation(self.logits(prompt), tuple(self._greedy(prompt, num_tokens)), steps=None)

    def _greedy(self, prompt: torch.Tensor, num_tokens: int) -> list[int]:
        if self._has_tokenizer and llama_cpp.is_installed() and not self._turns_by_context(prompt, num_tokens):
            return _llama_cpp_greedy(self._path, prompt, num_tokens)
        tokens: list[int] = []
        for _ in range(num_tokens):
            sequence = torch.cat([prompt, torch.tensor([tokens], dtype=prompt.dtype)], dim=1)
            tokens.append(int(self.logits(sequence)[0, -1].argmax()))
        return tokens

    def _turns_by_context(self, prompt: torch.Tensor, num_tokens: int) -> bool:
        """Whether llama.cpp turns a short text as a long one, since its context is longer than such texts are."""
        context = max(prompt.shape[1] + num_tokens, _SMALLEST_CONTEXT)
        is_long = self._key("rope.scaling.type") == "longrope"
        return bool(is_long and context > self._key("rope.scaling.original_context_length"))


def _capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(x / cap) if cap else x


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
