"""The command `amoeba` on a machine whose `cpu` is a rule, not a clock."""

from __future__ import annotations

import sys

from amoeba_export import backends
from amoeba_export.application import resolve
from amoeba_export.backends import onnxruntime
from amoeba_export.cli.app import main
from tests import imaginary


class Options(imaginary.Options, onnxruntime.Options):
    """Those of ONNX Runtime too."""


class Cpu(imaginary.Imaginary):
    """In the place of ONNX Runtime."""

    options_model = Options


CPU = Cpu()


def entry() -> None:
    """As a console script."""
    backends.BACKENDS = {**backends.BACKENDS, "onnxruntime": "tests.docs.cpu:CPU"}
    resolve.DEFAULT_REFIT = "off"
    sys.exit(main())
