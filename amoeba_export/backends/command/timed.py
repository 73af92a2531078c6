"""One model under the commands of a target."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from amoeba_export.backends import Subject
from amoeba_export.backends.command.figures import Figure, NoFigure
from amoeba_export.backends.command.files import path_values, present, workload_values
from amoeba_export.backends.command.options import Options, Phase
from amoeba_export.backends.command.process import MOST_BYTES, Broke, Ran, last_lines, run_words
from amoeba_export.backends.command.template import fill, placeholders, spelled
from amoeba_export.errors import AmoebaError, CommandFailed, InputError, TargetError, UnsupportedError
from amoeba_export.ir import Target, Workload

FAILURES = (InputError, UnsupportedError, TargetError)
"""What costs a model its result, and no other model."""

SLACK = 2.0
"""So much longer than a command ran may the time be that it reports: a median, times all tokens, is no sum."""


@dataclass
class TimedModel:
    """One model and its way: it is pushed, timed in every round, cleaned up.

    Attributes:
        folder: A folder of ours for its files; made by `push`.
        limit_s: How long one run may take.
        name: What its files are called on the device: no other model, in no other process, has it.
    """

    subject: Subject
    folder: Path
    workload: Workload
    target: Target
    options: Options
    limit_s: float
    name: str = field(default_factory=lambda: f"amoeba-{secrets.token_hex(6)}")
    num_runs: int = 0
    is_begun: bool = False

    def push(self) -> None:
        """Bring it to the device."""
        self.folder.mkdir()
        (self.folder / "work").mkdir()
        self._run_all(self.options.push)

    def time(self) -> dict[str, list[float]]:
        """The samples of one round, `decode_ms` and `prefill_ms`."""
        options = self.options
        if options.e2e is None:
            texts: dict[tuple[str, ...], _Printed] = {}
            return {f"{phase}_ms": self._samples(phase, texts) for phase in options.figures}
        generate = self.workload.generate_tokens
        first_ms = median(self._samples("e2e", {}, generate_tokens=1))
        all_ms = median(self._samples("e2e", {}, generate_tokens=generate))
        if all_ms <= first_ms:
            raise self._failed(
                options.runs["e2e"],
                f"e2e took {all_ms:g} ms with {generate} tokens and {first_ms:g} ms with one, which cannot be",
                next_step="Let the command repeat its runs, or use a higher --generate.",
            )
        return {"decode_ms": [(all_ms - first_ms) / (generate - 1)], "prefill_ms": [first_ms]}

    def clean_up(self) -> str | None:
        """Remove it from the device, whatever came of it. Says what did not work: it may have left something."""
        problems = []
        for words in self.options.cleanup if self.is_begun else ():
            try:
                self._run(words, limit_s=self.options.transfer_timeout_s)
            except (*FAILURES, OSError) as error:
                problems.append(error.what if isinstance(error, AmoebaError) else str(error))
        if not problems:
            return None
        return f"Cleaning up {self.subject.label} failed, look for '{self.name}': {' '.join(problems)}"

    def _samples(
        self, phase: Phase, texts: dict[tuple[str, ...], _Printed], *, generate_tokens: int | None = None
    ) -> list[float]:
        """The samples of a figure. A command that prints several figures is run once: `texts` has what it printed."""
        figure, words = self.options.figures[phase], self.options.runs[phase]
        workload = self.workload
        if generate_tokens is not None:
            workload = replace(workload, generate_tokens=generate_tokens)
        if words not in texts:
            texts[words] = self._timed(words, workload)
        printed = texts[words]
        text = self._text_of(figure, phase, printed)
        tokens = workload.batch * (workload.prompt_tokens if phase == "prefill" else 1)
        if phase == "e2e":
            tokens = workload.batch * workload.generate_tokens
        try:
            samples = figure.samples_ms(text, tokens=tokens)
        except NoFigure as error:
            raise self._failed(
                printed.words,
                f"it prints no {phase} where the target says ({error})",
                printed=last_lines(text, printed.ran.stderr, printed.ran.stdout),
                next_step=f"Correct 'options.{phase}' of the target file.",
            ) from error
        repeated = workload.generate_tokens if phase == "decode" and "generate" in placeholders(words) else 1
        least_s = min(samples) * repeated / 1000
        if least_s > SLACK * printed.ran.seconds:
            raise self._failed(
                printed.words,
                f"it says that {phase} took {median(samples):g} ms, and ran for {printed.ran.seconds:.3g} s in all",
                printed=last_lines(text),
                next_step=f"Correct the unit in 'options.{phase}' of the target file.",
            )
        return samples

    def _timed(self, words: tuple[str, ...], workload: Workload) -> _Printed:
        """Run a command that times, fetch what it wrote, and keep all that figures may be in."""
        self.num_runs += 1
        out = self.folder / f"out-{self.num_runs}"
        out.mkdir()
        try:
            done, ran = self._run(words, limit_s=self.limit_s, workload=workload)
            self._run_all(self.options.pull, workload=workload)
            values = self._values(workload)
            files = {
                template: _read(Path(fill(template, values)))
                for figure in self.options.figures.values()
                if (template := figure.file) is not None
            }
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return _Printed(words=done, ran=ran, files=files)

    def _text_of(self, figure: Figure, phase: Phase, printed: _Printed) -> str:
        if figure.file is None:
            return printed.ran.stdout if figure.stream == "stdout" else printed.ran.stderr
        text = printed.files[figure.file]
        if text is None:
            raise self._failed(
                printed.words,
                f"there is no file '{figure.file}' to read {phase} from, or it is too large",
                printed=last_lines(printed.ran.stderr, printed.ran.stdout),
                next_step=f"Correct 'options.{phase}.file' of the target file, or the command that makes it.",
            )
        return text

    def _run_all(self, commands: Sequence[tuple[str, ...]], *, workload: Workload | None = None) -> None:
        for words in commands:
            self._run(words, limit_s=self.options.transfer_timeout_s, workload=workload)

    def _run(
        self, words: tuple[str, ...], *, limit_s: float, workload: Workload | None = None
    ) -> tuple[list[str], Ran]:
        """Run one command with the model's values in it; the files that it names are there meanwhile."""
        used = placeholders(words)
        values = self._values(workload or self.workload)
        filled = [fill(word, values) for word in words]
        with present(self.subject, self.folder, used, self.target.formats[0], self.options):
            self.is_begun = True
            try:
                return filled, run_words(filled, limit_s=limit_s)
            except Broke as error:
                advice = "Run the command yourself; where it works there, correct [options] of the target file."
                if error.late:
                    key = "timeout_s" if limit_s == self.limit_s else "transfer_timeout_s"
                    advice = f"Run the command yourself to see what it waits for, or raise {key} in [options]."
                raise self._failed(filled, error.reason, printed=error.printed, next_step=advice) from error

    def _values(self, workload: Workload) -> dict[str, str]:
        used = set().union(*map(placeholders, self.options.commands))
        return {
            **path_values(self.subject, self.folder, used, self.target.formats[0]),
            **workload_values(self.subject, workload),
            "id": self.name,
            "run": str(self.num_runs),
            "work": str(self.folder / "work"),
            "out": str(self.folder / f"out-{self.num_runs}"),
        }

    def _failed(self, words: Sequence[str], reason: str, *, next_step: str, printed: str = "") -> CommandFailed:
        return CommandFailed(
            self.subject.label, self.target.name, reason, command=spelled(words), printed=printed, next_step=next_step
        )


@dataclass(frozen=True, kw_only=True)
class _Printed:
    """What one run of a command left: the command as it was run, its output, the files that figures are in."""

    words: Sequence[str]
    ran: Ran
    files: Mapping[str, str | None]


def _read(path: Path) -> str | None:
    """The text of a file that a command wrote, or None. Nothing that is not a plain file is opened."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        return None
    return path.read_text(encoding="utf-8", errors="replace")
