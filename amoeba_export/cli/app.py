"""`amoeba` on the command line. `main` is the only place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated

import typer

from amoeba_export.cli.bench import bench
from amoeba_export.cli.build import build, init
from amoeba_export.cli.cache import cache
from amoeba_export.cli.calibrate import calibrate
from amoeba_export.cli.console import Talk
from amoeba_export.cli.doctor import doctor
from amoeba_export.cli.evaluate import evaluate
from amoeba_export.cli.export import export, search
from amoeba_export.cli.finetune import finetune
from amoeba_export.cli.imports import import_strategy
from amoeba_export.cli.inspect import inspect
from amoeba_export.cli.profile import profile
from amoeba_export.cli.targets import targets
from amoeba_export.cli.verify import verify
from amoeba_export.errors import AmoebaError, InputError
from amoeba_export.version import __version__

INTERRUPTED = 130

app = typer.Typer(
    name="amoeba",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # fills the paragraphs of a docstring; "rich" keeps their line breaks
    pretty_exceptions_enable=False,  # errors are ours to show
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(export)
app.command()(calibrate)
app.command()(finetune)
app.command()(evaluate)
app.command()(search)
app.command()(profile)
app.command()(bench)
app.command()(inspect)
app.command()(verify)
app.command()(init)
app.command()(build)
app.command("import")(import_strategy)
app.command()(doctor)
app.add_typer(targets)
app.add_typer(cache)


def _version(asked: bool) -> None:
    if asked:
        print(f"amoeba {__version__}")
        raise typer.Exit


@app.callback()
def amoeba(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Works anywhere.")] = False,
) -> None:
    """Cut one LLM into dense models that fit a device's latency budget."""


def entry() -> None:
    """The console script."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, the code of the error's kind, 1 for a bug, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:  # users add it at the end of the line that failed; Typer wants it before the command
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    _quiet_libraries()
    talk = Talk()
    try:
        with _termination_interrupts():
            command = typer.main.get_command(app)
            code = command(args=arguments, prog_name="amoeba", standalone_mode=False)
            sys.stdout.flush()
        # Typer turns a KeyboardInterrupt into the code 130, and typer.Exit into its own; commands return nothing
        if code == INTERRUPTED:
            talk.note("Interrupted. Nothing half-written is left.")
        return code or 0
    except KeyboardInterrupt:
        talk.note("Interrupted. Nothing half-written is left.")
        return INTERRUPTED
    except AmoebaError as error:
        if debug:
            traceback.print_exc()
        talk.error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        return _usage(error, talk)
    except BrokenPipeError:
        return _close_quietly()
    except SystemExit as stop:  # shell completion ends like this, and Typer's and rich's idea of a broken pipe
        return _close_quietly() if isinstance(stop.__context__, BrokenPipeError) else int(stop.code or 0)
    except OSError as error:
        if debug:
            traceback.print_exc()
        if (explained := _explain(error)) is None:
            return _bug(error, talk, debug)
        talk.error(str(explained))
        return explained.exit_code
    except Exception as error:  # the boundary: whatever comes here is a bug of ours
        return _bug(error, talk, debug)


def _close_quietly() -> int:
    """The reader of stdout has seen enough, as `head` does: what is still buffered goes nowhere."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _usage(error: typer.TyperException, talk: Talk) -> int:
    """A command line that Typer could not read. Without a message, the help was the answer and is printed already."""
    message = error.format_message()
    context: typer.Context | None = getattr(error, "ctx", None)
    if type(error).__name__ != "NoArgsIsHelpError":
        command = context.command_path if context else "amoeba"
        talk.error(f"{message}\n  next:  '{command} --help' shows what there is.")
    return 2


def _bug(error: Exception, talk: Talk, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    talk.error(f"This is a bug in amoeba: {type(error).__name__}: {error}")
    if not debug:
        talk.note("  next:  Run the same command with --debug, and report it with the traceback and 'amoeba doctor'.")
    return 1


def _explain(error: OSError) -> InputError | None:
    """What the machine refused, in words; None for what only a bug of ours can cause."""
    where = error.filename if isinstance(error.filename, str) else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError("The disk is full.", where=where, next_step="Free some space and run it again.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return InputError(
            f"The system refused: {error.strerror}.", where=where, next_step="Check the permissions, and run it again."
        )
    return None


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """While a command runs, SIGTERM and SIGHUP stop it as Ctrl-C does: everything on the way out is cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: so do we
                before[number] = signal.signal(number, interrupt)
    except ValueError:  # called from a thread, where no handler can be set
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet_libraries() -> None:
    """What transformers and its friends print of their own accord would spoil bars and logs. A user's setting wins."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    # Where it is installed, peft imports it, and it then misses a kernel that nothing here would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
