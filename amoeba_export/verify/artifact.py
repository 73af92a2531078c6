"""Does what was written compute what the masked supernet computes?"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

from amoeba_export.errors import NotFound, NumbersDiffer
from amoeba_export.ir import SILENT, Progress, SubnetPlan, Supernet
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.opening import read_tokenizer
from amoeba_export.verify.gguf_tokens import check_tokens
from amoeba_export.verify.masked import masked_logits
from amoeba_export.verify.numerics import EXACT_DTYPES, MAX_REL_DIFF, Distance, broken_limits, logits_distance
from amoeba_export.verify.opened import Opened
from amoeba_export.verify.reload import OPENERS, open_format

NUM_GREEDY = 16
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

    @property
    def mean_kl(self) -> float | None:
        """Of quantized formats, in nats per token: their function is another one. None if there are none."""
        return max((report.distance.mean_kl for report in self._quantized), default=None)

    @property
    def perplexity_ratio(self) -> float | None:
        """Of quantized formats, relative to the same shape unquantized."""
        return max((report.distance.perplexity_ratio for report in self._quantized), default=None)

    @property
    def _quantized(self) -> list[FormatReport]:
        return [report for report in self.formats if report.dtype not in EXACT_DTYPES]

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
        ForeignCode: It has code in it that is not amoeba's, or names some.
        NumbersDiffer: A format does not compute what it should.
        TokensDiffer: llama.cpp makes other tokens from a GGUF file than the tokenizer beside the supernet.
    """
    formats = [name for name in OPENERS if (folder / name).is_dir()]
    if not formats:
        raise NotFound("A format to verify", folder, next_step=f"It should have one of: {', '.join(OPENERS)}.")
    if "gguf" in formats:
        check_tokens(folder / "gguf", supernet.tokenizer_folder or supernet.folder)
    prompts = _prompts(supernet)
    with progress.track("Comparing with the masked supernet", len(formats) + 1) as advance:
        answers = []
        for name in formats:
            answers.append(_ask(open_format(name, folder), prompts))
            advance(1)
        reference = _reference(supernet, plan, prompts, {answer.tokens for answer in answers})
        reports = [
            _judge(name, folder / name, prompts, answer, reference)
            for name, answer in zip(formats, answers, strict=True)
        ]
        advance(1)
    return VerifyReport(formats=tuple(reports))


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a format says to the prompts: logits [1, T, V] of each, and how it continues the last one.

    Attributes:
        steps: As in `Continuation`.
    """

    dtype: str
    logits: Sequence[torch.Tensor]
    tokens: tuple[int, ...]
    steps: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Reference:
    """What the masked supernet says: logits of each prompt, and [G, V] after each prefix of each continuation."""

    logits: Sequence[torch.Tensor]
    after: Mapping[tuple[int, ...], torch.Tensor]


def _ask(opened: Opened, prompts: Sequence[torch.Tensor]) -> _Answer:
    *others, last = prompts
    logits = [opened.logits(prompt) for prompt in others]
    end = opened.continued(last, NUM_GREEDY)
    return _Answer(dtype=opened.dtype, logits=[*logits, end.logits], tokens=end.tokens, steps=end.steps)


def _reference(
    supernet: Supernet, plan: SubnetPlan, prompts: Sequence[torch.Tensor], continuations: Collection[tuple[int, ...]]
) -> _Reference:
    """One pass for all texts of a length. The last prompt comes with its continuations, which need not be run apart."""
    *others, last = prompts
    length = last.shape[1]
    texts = {tokens: torch.cat([last, torch.tensor([tokens])], dim=1) for tokens in continuations}
    rows = [*others, *texts.values()]
    found: dict[int, torch.Tensor] = {}
    for size in {row.shape[1] for row in rows}:
        positions = [i for i, row in enumerate(rows) if row.shape[1] == size]
        logits_BTV = masked_logits(supernet, plan, torch.cat([rows[i] for i in positions]))
        found |= {i: logits_TV[None] for i, logits_TV in zip(positions, logits_BTV, strict=True)}
    continued = [found[i] for i in range(len(others), len(rows))]
    return _Reference(
        logits=[*(found[i] for i in range(len(others))), continued[0][:, :length]],
        after={tokens: logits[0, length - 1 : -1] for tokens, logits in zip(texts, continued, strict=True)},
    )


def _judge(
    name: str, folder: Path, prompts: Sequence[torch.Tensor], answer: _Answer, reference: _Reference
) -> FormatReport:
    distance = logits_distance(prompts, reference.logits, answer.logits)
    broken = broken_limits(distance, answer.dtype)
    if not broken and answer.steps is not None:
        after = reference.after[answer.tokens][None, 1:]
        through_cache = logits_distance([torch.tensor([answer.tokens[:-1]])], [after], [answer.steps])
        broken = [f"through the KV cache, {problem}" for problem in broken_limits(through_cache, answer.dtype)]
    equal = not broken and _follows(
        answer.tokens, reference.after[answer.tokens], tie=max(MAX_REL_DIFF["fp32"], distance.max_rel_diff)
    )
    if not broken and not equal and answer.dtype == "fp32":
        broken = [f"greedy decoding through the KV cache gives other tokens: {list(answer.tokens)}"]
    if broken:
        raise NumbersDiffer(folder, broken)
    return FormatReport(format=name, dtype=answer.dtype, distance=distance, greedy_tokens_equal=equal)


def _follows(tokens: Sequence[int], logits_GV: torch.Tensor, *, tie: float) -> bool:
    """Whether the reference, given each prefix, picks the next of `tokens`: the same as comparing greedy runs.

    Where the reference's best two are no further apart than `tie`, a share of the largest logit, either choice follows.
    """
    behind_G = logits_GV.amax(-1) - logits_GV.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((behind_G <= tie * logits_GV.abs().max()).all())


def _prompts(supernet: Supernet) -> list[torch.Tensor]:
    """Token ids [1, T]: random ones, and the text last when there is a tokenizer for it."""
    generator = torch.Generator().manual_seed(0)
    architecture = supernet.architecture
    room = architecture.max_positions - NUM_GREEDY
    length = min(_PROMPT_TOKENS, room)
    prompts = [torch.randint(architecture.vocab_size, (1, length), generator=generator) for _ in range(2)]
    folder = supernet.tokenizer_folder or supernet.folder
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        with ONE_AT_A_TIME:
            ids = [token for token in _text_ids(folder) if token < architecture.vocab_size]
        prompts.append(torch.tensor([ids[: min(_TEXT_TOKENS, room)]]))
    return prompts


@lru_cache(maxsize=1)
def _text_ids(folder: Path) -> list[int]:
    """The text in tokens. The last folder's are kept: a build asks for the same ones for every artifact."""
    if (folder / "tokenizer.json").is_file():
        # Any sensible tokens will do, and transformers takes 1.5 s to make its tokenizer from this file.
        return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(_TEXT).ids
    # Not verbose: it would warn of a text that is longer than the model takes, and only the start of it is used.
    ids: list[int] = read_tokenizer(folder)(_TEXT, verbose=False).input_ids
    return ids
