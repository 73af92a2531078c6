"""Does what was written compute what the masked supernet computes?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from amoeba_export.errors import NotFound, NumbersDiffer
from amoeba_export.ir import SILENT, Progress, SubnetPlan, Supernet
from amoeba_export.verify.masked import masked_logits
from amoeba_export.verify.numerics import MAX_REL_DIFF, Distance, broken_limits, logits_distance
from amoeba_export.verify.reload import OPENERS

NUM_GREEDY = 32
_PROMPT_TOKENS = 24
_TEXT_TOKENS = 128
_TEXT = (
    "The river rises in the hills north of the town and runs for forty miles before it reaches the sea. In spring, "
    "when the snow melts, it carries so much water that the lower fields are flooded for weeks. The people who live "
    "there have learned to build their houses on small mounds of earth, and to keep a boat behind the barn. Once a "
    "year they meet at the old mill to decide who will repair the banks, how much each farm has to pay, and what "
    "should be done with the money that is left over. It is usually spent on bread, cheese and music."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatReport:
    """What was found for one format.

    Attributes:
        dtype: Of its weights, as its files say.
        greedy_tokens_equal: Whether each of `NUM_GREEDY` tokens, decoded through the KV cache, is what the reference
            picks after the same tokens.
    """

    format: str
    dtype: str
    distance: Distance
    greedy_tokens_equal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was found for an artifact. The figures of the whole are those of its worst format."""

    formats: tuple[FormatReport, ...]

    @property
    def max_abs_diff(self) -> float:
        """Largest difference of any logit."""
        return max(report.distance.max_abs_diff for report in self.formats)

    @property
    def max_rel_diff(self) -> float:
        """The same, as a share of the largest reference logit."""
        return max(report.distance.max_rel_diff for report in self.formats)

    @property
    def greedy_tokens_equal(self) -> bool:
        """In every format."""
        return all(report.greedy_tokens_equal for report in self.formats)

    def to_json(self) -> dict[str, dict[str, object]]:
        """Figures by format."""
        return {
            report.format: {
                "dtype": report.dtype,
                **dataclasses.asdict(report.distance),
                "greedy_tokens_equal": report.greedy_tokens_equal,
            }
            for report in self.formats
        }


def verify_artifact(folder: Path, supernet: Supernet, plan: SubnetPlan, *, progress: Progress = SILENT) -> VerifyReport:
    """Open every format of an artifact from disk and compare it with the masked supernet.

    Prompts are seeded random tokens and, where the supernet has a tokenizer, a paragraph of text. fp32, fp16 and bf16
    must agree in every logit within a tolerance, fp32 in every greedy token too; quantized formats must stay within
    limits of KL divergence and perplexity.

    Args:
        folder: The artifact: a folder of folders named after formats.
        supernet: What it was cut from, with the adapters and the strategy that it was cut with.
        plan: What was cut.
        progress: Told what is being compared.

    Raises:
        NotFound: There is no format in `folder`.
        NumbersDiffer: A format does not compute what it should.
    """
    formats = [name for name in OPENERS if (folder / name).is_dir()]
    if not formats:
        raise NotFound("A format to verify", folder, next_step=f"It should have one of: {', '.join(OPENERS)}.")
    prompts = _prompts(supernet)
    with progress.track("Comparing with the masked supernet", len(formats) + 1) as advance:
        reference = _unpadded(masked_logits(supernet, plan, _padded(prompts)), prompts)
        advance(1)
        reports = []
        for name in formats:
            reports.append(_verify_format(name, folder / name, supernet, plan, prompts, reference))
            advance(1)
    return VerifyReport(formats=tuple(reports))


def _verify_format(
    name: str,
    folder: Path,
    supernet: Supernet,
    plan: SubnetPlan,
    prompts: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
) -> FormatReport:
    opened = OPENERS[name](folder)
    distance = logits_distance(prompts, reference, [opened.logits(prompt) for prompt in prompts])
    broken = broken_limits(distance, opened.dtype)
    equal = False
    if not broken:
        tokens = opened.greedy(prompts[-1][:, :_PROMPT_TOKENS], NUM_GREEDY)
        equal = _follows(supernet, plan, prompts[-1][:, :_PROMPT_TOKENS], tokens)
        if not equal and opened.dtype == "fp32":
            broken = [f"greedy decoding through the KV cache gives other tokens: {tokens}"]
    if broken:
        raise NumbersDiffer(folder, broken)
    return FormatReport(format=name, dtype=opened.dtype, distance=distance, greedy_tokens_equal=equal)


def _follows(supernet: Supernet, plan: SubnetPlan, prompt: torch.Tensor, tokens: Sequence[int]) -> bool:
    """Whether the reference, given each prefix, picks the next of `tokens`: the same as comparing greedy runs.

    One forward pass over the whole sequence instead of one per token. Where the reference has a tie, up to rounding,
    either choice follows.
    """
    chosen = torch.tensor(tokens)
    sequence = torch.cat([prompt, chosen[None]], dim=1)
    logits_TV = masked_logits(supernet, plan, sequence)[0, prompt.shape[1] - 1 : -1]
    behind_T = logits_TV.amax(-1) - logits_TV.gather(-1, chosen[:, None])[:, 0]
    return bool((behind_T <= MAX_REL_DIFF["fp32"] * logits_TV.abs().max()).all())


def _prompts(supernet: Supernet) -> list[torch.Tensor]:
    """Token ids [1, T]: random ones, and the text last when there is a tokenizer for it."""
    generator = torch.Generator().manual_seed(0)
    architecture = supernet.architecture
    length = min(_PROMPT_TOKENS, architecture.max_positions - NUM_GREEDY)
    prompts = [torch.randint(architecture.vocab_size, (1, length), generator=generator) for _ in range(2)]
    if any((supernet.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = AutoTokenizer.from_pretrained(supernet.folder)
        ids = tokenizer(_TEXT, return_tensors="pt").input_ids[:, : min(_TEXT_TOKENS, architecture.max_positions)]
        prompts.append(ids)
    return prompts


def _padded(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One batch. Zeros on the right cannot be seen by the tokens before them: attention is causal."""
    longest = max(prompt.shape[1] for prompt in prompts)
    return torch.cat([torch.nn.functional.pad(prompt, (0, longest - prompt.shape[1])) for prompt in prompts])


def _unpadded(logits_BTV: torch.Tensor, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [logits_BTV[i : i + 1, : prompt.shape[1]] for i, prompt in enumerate(prompts)]
