"""Multiple-choice questions: how one is read from a record, and how MMLU asks it."""

from __future__ import annotations

from dataclasses import dataclass

from amoeba_export.reading.records import Record

ANSWER = "Answer:"
"""Ends a question; the letter of the choice comes next."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Of the choices, in their order. There are no more choices than letters."""


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """One multiple-choice question; `answer` is the position of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int

    @property
    def prompt(self) -> str:
        """The zero-shot form of MMLU: the question, one lettered line per choice, and `ANSWER`."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.question, *lines, ANSWER])

    @property
    def answered(self) -> str:
        """The prompt with the right answer after it: a question as text."""
        return f"{self.prompt} {LETTERS[self.answer]}. {self.choices[self.answer]}"


def read_question(record: Record) -> MultipleChoice:
    """The question of a record with `question` (or `context`), `choices` and `answer`.

    Raises:
        BadRecord: A field is missing, or makes no sense.
    """
    question = record.text("context" if "context" in record and "question" not in record else "question")
    choices = record.value("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise record.bad("has a field 'choices' that is not a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise record.bad(f"has {len(choices)} choices; 2 to {len(LETTERS)} can be asked")
    answer = record.value("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise record.bad(f"has the answer {answer!r}, which is no position in its choices")
    return MultipleChoice(question, tuple(choices), answer)
