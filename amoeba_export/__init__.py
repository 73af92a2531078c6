"""Amoeba: cut one LLM into dense subnets that fit a device. See `pipeline.export` for the whole story."""

__version__ = "0.1.0"
