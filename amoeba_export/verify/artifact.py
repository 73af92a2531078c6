"""Is what was written what was cut, and does it compute what the masked supernet computes?"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

from amoeba_export.errors import AmoebaError, NotFound, NotRunnable, NumbersDiffer
from amoeba_export.ir import SILENT, Progress, SubnetPlan, Supernet
from amoeba_export.ir.rounded import RoundedWeights
from amoeba_export.model.loading import ONE_AT_A_TIME
from amoeba_export.model.tokenizer import has_tokenizer, open_tokenizer
from amoeba_export.verify.expected import ExpectedWeights
from amoeba_export.verify.gguf_tokens import check_tokens
from amoeba_export.verify.graph import Answer, Reference, ask, graph_problems, reference_of, rope_problem, step_problems
from amoeba_export.verify.masked import source_rope
from amoeba_export.verify.numerics import (
    EXACT_DTYPES,
    MAX_REL_DIFF,
    Distance,
    broken_limits,
    chosen_problem,
    logits_distance,
)
from amoeba_export.verify.opened import Opened
from amoeba_export.verify.reload import OPENERS, open_format
from amoeba_export.verify.scattered import with_stored_weights
from amoeba_export.verify.stored import STORED, StoredWeights
from amoeba_export.verify.weights import check_storage, check_weights

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
        prompt: The tokens before them.
        tokens: These tokens.
    """

    format: str
    dtype: str
    distance: Distance
    greedy_tokens_equal: bool
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


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


def verify_artifact(
    folder: Path,
    supernet: Supernet,
    plan: SubnetPlan,
    *,
    rounded: RoundedWeights | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Open every format of an artifact from disk and compare it with the masked supernet.

    Every stored weight is compared with what it must be, within the rounding of its own storage (`weights.py`). Then
    the graph must compute with these weights what the family computes, in fp32 arithmetic, to fp32's limit in every
    dtype: prompts, decode steps through the cache, a cache that ends near the context's end, and RoPE everywhere. And
    what the runtime makes of the files as they are must stay within the limits of their dtype (`numerics.py`).

    Prompts are seeded random tokens and, where the supernet has a tokenizer, a paragraph of text.

    Args:
        folder: The artifact: a folder of folders named after formats.
        supernet: What it was cut from, with the adapters and the strategy that it was cut with.
        plan: What was cut.
        rounded: What its format must have, where integers were chosen with data.
        progress: Told what is being compared.

    Raises:
        NotFound: There is no format in `folder`.
        ForeignCode: It has code in it that is not amoeba's, or names some.
        DamagedFile, WeightsMismatch: A file is not one of its format, or has other weights than the plan.
        NumbersDiffer: A format does not compute what it should.
        TokensDiffer: llama.cpp makes other tokens from a GGUF file than the tokenizer beside the supernet.
        NotRunnable: A format's runtime does not run it.
    """
    formats = [name for name in OPENERS if (folder / name).is_dir()]
    if not formats:
        raise NotFound("A format to verify", folder, next_step=f"It should have one of: {', '.join(OPENERS)}.")
    if "gguf" in formats:
        check_tokens(folder / "gguf", supernet.text_folder, progress=progress)
    prompts = _prompts(supernet)
    expected = ExpectedWeights(supernet, plan)
    with progress.track("Comparing with the masked supernet", 2 * len(formats) + 1) as advance:
        subjects = []
        for name in formats:
            with _running(folder / name):
                stored = STORED[name](folder / name, expected.wanted)
                tensors = rounded.tensors if rounded is not None and rounded.format == name else None
                wanted = ExpectedWeights(supernet, plan, rounded=tensors)
                dtypes = check_weights(folder / name, stored, wanted)
                opened = open_format(name, folder)
                check_storage(folder / name, dtypes, opened, wanted)
                subjects.append(_OpenedFormat(name, folder / name, stored, opened, ask(opened, prompts, NUM_GREEDY)))
            advance(1)
        reference = reference_of(supernet, plan, prompts, {subject.answer.tokens for subject in subjects})
        advance(1)
        reports = []
        for subject in subjects:
            with _running(subject.folder):
                reports.append(_judge(subject, supernet, plan, prompts, reference))
            advance(1)
    return VerifyReport(formats=tuple(reports))


def check_numbers(opened: Opened, folder: Path, supernet: Supernet, plan: SubnetPlan) -> Distance:
    """How far a runtime's logits are from the masked supernet's. Neither weights nor graph are compared.

    For files that are measured and thrown away; `verify_artifact` takes several times as long.

    Args:
        opened: One format.
        folder: Where it is.
        supernet: What it was cut from.
        plan: What was cut.

    Raises:
        NumbersDiffer: They are beyond the limits of the dtype.
        NotRunnable: Its runtime does not run it.
    """
    prompts = _prompts(supernet)
    with _running(folder):
        answer = ask(opened, prompts, 1)
    reference = reference_of(supernet, plan, prompts, [answer.tokens])
    distance = logits_distance(prompts, reference.logits, answer.logits)
    if broken := broken_limits(distance, opened.dtype):
        raise NumbersDiffer(folder, broken)
    return distance


@dataclass(frozen=True, slots=True)
class _OpenedFormat:
    """One format, its weights compared and its answers given."""

    name: str
    folder: Path
    stored: StoredWeights
    opened: Opened
    answer: Answer


@contextlib.contextmanager
def _running(folder: Path) -> Iterator[None]:
    """What a runtime raises of a file that it cannot take is no closed list."""
    try:
        yield
    except (AmoebaError, MemoryError):
        raise
    except Exception as error:
        raise NotRunnable(folder, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _judge(
    subject: _OpenedFormat,
    supernet: Supernet,
    plan: SubnetPlan,
    prompts: Sequence[torch.Tensor],
    reference: Reference,
) -> FormatReport:
    opened, answer, dtype = subject.opened, subject.answer, subject.opened.dtype
    distance = logits_distance(prompts, reference.logits, answer.logits)
    chosen = chosen_problem(reference.logits, answer.logits)
    broken = [chosen] if chosen else broken_limits(distance, dtype)
    tie = max(MAX_REL_DIFF["fp32"], distance.max_rel_diff)
    equal = not broken and _follows(answer.tokens, reference.after[answer.tokens], tie=tie)
    rope = source_rope(supernet, plan)
    if not broken and (problem := rope_problem(opened, rope, supernet.architecture.max_positions)):
        broken = [problem]
    exact = None if broken else opened.exact(rope)
    if not broken and exact is not None:
        held, held_plan = (supernet, plan) if dtype == "fp32" else with_stored_weights(supernet, plan, subject.stored)
        same_weights = reference if dtype == "fp32" else None
        broken = graph_problems(exact, held, held_plan, prompts, answer if exact is opened else None, same_weights)
    elif not broken:
        broken = step_problems(answer, reference, dtype)
    if not broken and not equal and dtype == "fp32":
        broken = [f"greedy decoding through the KV cache gives other tokens: {list(answer.tokens)}"]
    if broken:
        raise NumbersDiffer(subject.folder, broken)
    return FormatReport(
        format=subject.name,
        dtype=dtype,
        distance=distance,
        greedy_tokens_equal=equal,
        prompt=tuple(map(int, prompts[-1][0])),
        tokens=tuple(map(int, answer.tokens)),
    )


def _follows(tokens: Sequence[int], logits_GV: torch.Tensor, *, tie: float) -> bool:
    """Whether the reference, given each prefix, picks the next of `tokens`: the same as comparing greedy runs.

    Where the reference's best two are no further apart than `tie`, a share of the largest logit, either choice follows.
    """
    behind_G = logits_GV.amax(-1) - logits_GV.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((behind_G <= tie * logits_GV[logits_GV.isfinite()].abs().max()).all())


def _prompts(supernet: Supernet) -> list[torch.Tensor]:
    """Token ids [1, T]: random ones, and the text last when there is a tokenizer for it."""
    generator = torch.Generator().manual_seed(0)
    architecture = supernet.architecture
    room = architecture.max_positions - NUM_GREEDY
    length = min(_PROMPT_TOKENS, room)
    prompts = [torch.randint(architecture.vocab_size, (1, length), generator=generator) for _ in range(2)]
    folder = supernet.text_folder
    if has_tokenizer(folder):
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
    ids: list[int] = open_tokenizer(folder)(_TEXT, verbose=False).input_ids
    return ids
