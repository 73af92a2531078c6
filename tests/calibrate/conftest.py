"""Calibration is tested on the same models and texts as the layers that it runs."""

from tests.model.conftest import _one_thread, supernet, text_file

__all__ = ["_one_thread", "supernet", "text_file"]
