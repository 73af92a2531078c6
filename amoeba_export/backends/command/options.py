"""The `[options]` table of a target whose models are timed by a command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from amoeba_export.backends.command.figures import Figure
from amoeba_export.backends.command.template import PATHS, PlainWords, Words, placeholders
from amoeba_export.backends.targets import Strict

Phase = Literal["decode", "prefill", "e2e"]


class Options(Strict):
    """How models get to a device, are timed there, and go.

    Attributes:
        run: The command that times a model. Either it prints `decode` and `prefill`, or `e2e` alone.
        decode: Time of a token, or tokens per second of all sequences.
        prefill: Time of the whole prompt, or its tokens per second.
        e2e: Time of prompt and generated tokens: it is run for one token and for all, which gives the other two.
        push: Commands that bring a model to the device, once for each.
        pull: Commands after every run, such as one that fetches the file with the figures.
        cleanup: Commands that remove a model from the device, whatever happened.
        describe: What is known of the device, by name: the last line that a command prints. Cost tables are kept by it,
            and the target is unavailable when one of them fails.
        prompt_tokens: The length of the prompt of a command that cannot be told one: no `{prompt}` in it.
        timeout_s: How long one run may take; None for as long as the caller allows.
        transfer_timeout_s: How long each of the other commands may take.
        dialect: Operators of ONNX graphs: `ort`, or `standard` for other runtimes than onnxruntime.
    """

    run: Words | None = None
    decode: Figure | None = None
    prefill: Figure | None = None
    e2e: Figure | None = None
    push: tuple[Words, ...] = ()
    pull: tuple[Words, ...] = ()
    cleanup: tuple[Words, ...] = ()
    describe: dict[str, PlainWords] = Field(default_factory=dict)
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    timeout_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    transfer_timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600
    dialect: Literal["auto", "ort", "standard"] = "ort"

    @model_validator(mode="after")
    def _belongs_together(self) -> Options:
        phases = set(self.figures)
        if phases not in ({"decode", "prefill"}, {"e2e"}):
            raise ValueError("it needs the tables decode and prefill, or e2e alone")
        for phase, figure in self.figures.items():
            if figure.run is None and self.run is None:
                raise ValueError(f"there is no command that prints {phase}: give run")
        if self.e2e and "generate" not in placeholders(self.runs["e2e"]):
            raise ValueError("e2e is run for one token and for all, so its command needs {generate}")
        told = all("prompt" in placeholders(words) for words in self.runs.values())
        if told == (self.prompt_tokens is not None):
            raise ValueError("the command needs {prompt}, or, where it has a prompt of its own, prompt_tokens")
        if any(placeholders(words) & {"out", "run"} for words in (*self.push, *self.cleanup)):
            raise ValueError("{out} and {run} belong to one run, push and cleanup to none: use {work} and {id} there")
        if not any(placeholders(words) & {*PATHS} for words in self.commands):
            raise ValueError("no command has {artifact}, {safetensors}, {onnx} or {gguf}: what would it time?")
        return self

    @property
    def figures(self) -> dict[Phase, Figure]:
        """Those that are given."""
        given: dict[Phase, Figure | None] = {"decode": self.decode, "prefill": self.prefill, "e2e": self.e2e}
        return {phase: figure for phase, figure in given.items() if figure is not None}

    @property
    def runs(self) -> dict[Phase, tuple[str, ...]]:
        """The command of each figure."""
        return {phase: figure.run or self.run or () for phase, figure in self.figures.items()}

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """Every command that is given a model, each once."""
        return list(dict.fromkeys([*self.push, *self.runs.values(), *self.pull, *self.cleanup]))

    @property
    def programs(self) -> Iterator[str]:
        """What has to be installed."""
        for words in (*self.describe.values(), *self.commands):
            if not placeholders(words[:1]):
                yield words[0]
