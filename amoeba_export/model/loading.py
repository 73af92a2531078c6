"""Building models in threads."""

from __future__ import annotations

import threading

ONE_AT_A_TIME = threading.Lock()
"""Held while transformers makes a model or a tokenizer: it patches torch for as long, and two at once break each other.
Models that are made can run beside that."""
