"""Distributed batch inference for hybrid Mamba-2 reasoning models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchrun.cluster.api import run
    from batchrun.engine.params import SamplingParams
    from batchrun.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__", "run"]
__version__ = "0.1.0"

# What torch and OpenMP read once, before the first tensor: so it stands here, and holds unless
# torch came first or somebody has set it.
#
# Large tensors go into huge pages: a CPU reads states and weights up to a fifth faster, because
# less of its time goes into addresses.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# A thread that waits for another gives up its core after some 50 microseconds. By itself it would
# keep it for milliseconds, so that a thread which lost its core to a neighbour could not come back
# to the core that is idle: on a busy machine a step took ten times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


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
