"""The version of amoeba. It imports nothing, so that every room may name it."""

__version__ = "0.1.0"
