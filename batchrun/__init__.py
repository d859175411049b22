"""Distributed batch inference for hybrid Mamba-2 reasoning models."""

__version__ = "0.1.0"
