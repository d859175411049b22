"""Distributed batch inference for hybrid Mamba-2 reasoning models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.cluster.api import run
    from batchrun.engine.params import SamplingParams
    from batchrun.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import what is heavy only when it is asked for, so that the command line starts quickly."""
    match name:
        case "LLM":
            from batchrun.llm import LLM

            return LLM
        case "SamplingParams":
            from batchrun.engine.params import SamplingParams

            return SamplingParams
        case "run":
            from batchrun.cluster.api import run

            return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
