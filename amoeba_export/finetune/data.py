"""Training data: records become tokens, of which the answers are labels.

A JSONL line is one of

    {"instruction": ..., "input": ... (may be left out), "output": ...}     the output is trained on
    {"messages": [{"role": ..., "content": ...}, ...]}                      every assistant turn is
    {"text": ...}                                                           all of it is

and a file with any other ending is plain text, cut into documents at blank lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from amoeba_export.errors import InputError, UnsupportedError
from amoeba_export.ir import SILENT, Progress
from amoeba_export.model.samples import opening_of
from amoeba_export.reading.records import Record, read_records, read_text

WHAT = "training data"
CORRECT = "Correct the line. A line has 'instruction' and 'output', or 'messages', or 'text'."
ROLES = ("system", "user", "assistant", "tool")

# The words that Stanford Alpaca's models were trained with: what an instruction looks like without a chat template.
ALPACA_INTRO = "Below is an instruction that describes a task"
ALPACA_WITH_INPUT = (
    ALPACA_INTRO + ", paired with an input that provides further context. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_ALONE = (
    ALPACA_INTRO + ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text, and whether its tokens are labels."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One example, cut to the row length.

    Attributes:
        tokens_T: int32.
        trained_T: Which tokens are labels. Never the first: nothing predicts it.
    """

    tokens_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]


def read_examples(
    path: Path, tokenizer: Any, *, max_length: int, prompt: str = "auto", progress: Progress = SILENT
) -> list[Example]:
    """Every example of a file that has a label left within `max_length` tokens.

    Args:
        path: `.jsonl`, or plain text.
        tokenizer: Of transformers. Its own opening token, if it adds one, comes first; its end token closes an answer.
        max_length: Longer examples lose their end.
        prompt: `auto`, `alpaca` or `chat`: how instructions become text.
        progress: Told of examples that were cut or left out.

    Raises:
        InputError: The file is missing, empty or not text; a record is not one of the three kinds; no example is left.
        UnsupportedError: The tokenizer's chat template does not do what the data needs.
    """
    segments = _records(path, tokenizer, prompt) if path.suffix == ".jsonl" else _documents(path, tokenizer)
    examples, cut, dropped = [], 0, 0
    for tokens, trained in _tokenized(segments, tokenizer):
        cut += len(tokens) > max_length
        tokens_T = np.array(tokens[:max_length], dtype=np.int32)
        trained_T = np.array(trained[:max_length], dtype=bool)
        trained_T[:1] = False
        if trained_T.any():
            examples.append(Example(tokens_T, trained_T))
        else:
            dropped += 1
    if not examples:
        raise InputError(
            f"The training data has no example with an answer within {max_length} tokens.",
            where=path,
            next_step="Raise --max-length, or give data with shorter prompts.",
        )
    total = len(examples) + dropped
    if cut:
        progress.warn(f"{cut} of {total} examples are longer than {max_length} tokens and lose their end.")
    if dropped:
        progress.warn(f"{dropped} of {total} examples have no answer within {max_length} tokens and are left out.")
    return examples


def _documents(path: Path, tokenizer: Any) -> Iterator[list[Segment]]:
    end = tokenizer.eos_token or ""
    paragraphs = "\n".join(line.rstrip() for line in read_text(path, what=WHAT).split("\n")).split("\n\n")
    return ([Segment(text.strip("\n") + end, True)] for text in paragraphs if text.strip())


def _records(path: Path, tokenizer: Any, prompt: str) -> Iterator[list[Segment]]:
    if prompt == "chat" and not tokenizer.chat_template:
        raise UnsupportedError(
            "The prompt cannot be 'chat': the model's tokenizer has no chat template.",
            next_step="Use --prompt-format alpaca.",
        )
    chat = bool(tokenizer.chat_template) if prompt == "auto" else prompt == "chat"
    for record in read_records(path, what=WHAT, next_step=CORRECT):
        if "messages" in record:
            yield _chat_segments(_messages(record), tokenizer)
        elif "instruction" in record:
            instruction, answer = record.text("instruction"), record.text("output")
            context = record.text("input") if "input" in record else ""
            yield _instruction_segments(instruction, context, answer, tokenizer, chat=chat)
        elif "text" in record:
            yield [Segment(record.text("text") + (tokenizer.eos_token or ""), True)]
        else:
            raise record.bad(f"has none of 'instruction', 'messages' and 'text'; it has {record.names}")


def _instruction_segments(instruction: str, context: str, answer: str, tokenizer: Any, *, chat: bool) -> list[Segment]:
    if chat:
        question = f"{instruction}\n\n{context}" if context else instruction
        return _chat_segments(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer
        )
    words = ALPACA_WITH_INPUT if context else ALPACA_ALONE
    return [
        Segment(words.format(instruction=instruction, input=context), False),
        Segment(answer + (tokenizer.eos_token or ""), True),
    ]


def _chat_segments(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Segment]:
    """Each assistant turn is what the template adds to the conversation before it, its opening excepted."""
    if not tokenizer.chat_template:
        raise UnsupportedError(
            "The training data has chat messages, and the model's tokenizer has no chat template.",
            next_step="Give data with 'instruction' and 'output', or a model with a chat template.",
        )

    def render(count: int, *, opened: bool) -> str:
        turns = list(messages[:count])
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened))
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise UnsupportedError(  # it is a program of the model's, in a sandbox: whatever it does wrong ends here
                f"The model's chat template cannot be rendered: {error}.",
                next_step="Give data with 'instruction' and 'output' and --prompt-format alpaca.",
            ) from error

    segments, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, opened=True), render(i + 1, opened=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise UnsupportedError(
                "The model's chat template rewrites earlier turns, so the tokens of an answer cannot be told apart.",
                next_step="Give data with 'instruction' and 'output' and --prompt-format alpaca.",
            )
        segments += [Segment(before[len(done) :], False), Segment(after[len(before) :], True)]
        done = after
    return segments


def _tokenized(examples: Iterable[list[Segment]], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Segments are tokenized apart, so that no token straddles the border of an answer."""
    opening = opening_of(tokenizer)
    for segments in examples:
        tokens, trained = [], []
        pieces = tokenizer([segment.text for segment in segments], add_special_tokens=False)["input_ids"]
        for segment, piece in zip(segments, pieces, strict=True):
            tokens += piece
            trained += [segment.trained] * len(piece)
        if opening and tokens[: len(opening)] != opening:
            tokens, trained = opening + tokens, [False] * len(opening) + trained
        yield tokens, trained


def _messages(record: Record) -> list[dict[str, str]]:
    messages = record.value("messages")
    if not isinstance(messages, list) or not messages:
        raise record.bad("has a field 'messages' that is not a list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise record.bad(f"has no text as the content of message {number}")
        if message.get("role") not in ROLES:
            raise record.bad(f"has the role {message.get('role')!r} in message {number}; it can be {_list(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise record.bad("has no message of the assistant, so there is nothing to learn from it")
    return messages


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
