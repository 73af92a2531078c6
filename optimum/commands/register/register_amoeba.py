"""`optimum-cli export amoeba`: optimum imports every module in this namespace. No `__init__.py`: see PEP 420."""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class AmoebaExportCommand(BaseOptimumCLICommand):
    """Hands its arguments to `amoeba export` as they are: one list of flags, one help."""

    COMMAND = CommandInfo(name="amoeba", help="Cut an LLM to the latency budget of a device: ONNX, safetensors, GGUF.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take every word for a plain one, `--help` included."""
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run `amoeba export` and end with its exit code."""
        from amoeba_export.cli.app import main

        sys.exit(main(["export", *self.args.arguments]))


REGISTER_COMMANDS = [(AmoebaExportCommand, ExportCommand)]
