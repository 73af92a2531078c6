"""`amoeba` on the command line. `main` is the only place where errors become text and exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from amoeba_export.cli.bench import bench
from amoeba_export.cli.build import build, init
from amoeba_export.cli.cache import cache
from amoeba_export.cli.calibrate import calibrate
from amoeba_export.cli.console import Talk
from amoeba_export.cli.doctor import doctor
from amoeba_export.cli.entry import entry as entry
from amoeba_export.cli.evaluate import evaluate
from amoeba_export.cli.export import export, search
from amoeba_export.cli.finetune import finetune
from amoeba_export.cli.frontier import frontier
from amoeba_export.cli.imports import import_strategy
from amoeba_export.cli.inspect import inspect
from amoeba_export.cli.profile import profile
from amoeba_export.cli.refit import heal, refit
from amoeba_export.cli.stop import INTERRUPTED, SAYS, stoppable, was_interrupted
from amoeba_export.cli.streams import forgiving_streams
from amoeba_export.cli.targets import targets
from amoeba_export.cli.verify import verify
from amoeba_export.errors import AmoebaError, explain
from amoeba_export.reading import panics_as_errors
from amoeba_export.shown import for_terminal
from amoeba_export.version import __version__

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
app.command()(frontier)
app.command()(refit)
app.command()(heal)
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
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Works anywhere.")] = False,
) -> None:
    """Cut one LLM into dense models that fit a device's latency budget."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, the code of the error's kind, 1 for a bug, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:  # users add it at the end of the line that failed; Typer wants it before the command
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    _quiet_libraries()
    with stoppable(), forgiving_streams():
        talk = Talk()
        try:
            code = _run(arguments, talk, debug)
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except OSError as error:  # the answer could not be written
            code = _refused(error, talk, debug)
        if code == INTERRUPTED:
            talk.note(SAYS)
        return code


def _run(arguments: Sequence[str], talk: Talk, debug: bool) -> int:
    try:
        try:
            command = typer.main.get_command(app)
            # Typer turns a KeyboardInterrupt into the code 130, and typer.Exit into its own; commands return nothing
            with panics_as_errors():
                return command(args=arguments, prog_name="amoeba", standalone_mode=False) or 0
        except Exception:
            if was_interrupted():
                return INTERRUPTED
            raise
    except AmoebaError as error:
        if debug:
            sys.stderr.write(for_terminal(traceback.format_exc()))
        talk.error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        return _usage(error, talk)
    except SystemExit as stop:  # shell completion ends like this
        return int(stop.code or 0)
    except Exception as error:  # the boundary: what the machine did not refuse is a bug of ours
        return _refused(error, talk, debug)


def _refused(error: Exception, talk: Talk, debug: bool) -> int:
    explained = explain(error)
    if explained is None:
        return _bug(error, talk, debug)
    if debug:
        sys.stderr.write(for_terminal(traceback.format_exc()))
    talk.error(str(explained))
    return explained.exit_code


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
        sys.stderr.write(for_terminal(traceback.format_exc()))
    talk.error(f"This is a bug in amoeba: {type(error).__name__}: {error}")
    if not debug:
        talk.note("  next:  Run the same command with --debug, and report it with the traceback and 'amoeba doctor'.")
    return 1


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
    # It warns of templates for pairs of texts, which no GGUF holds.
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
