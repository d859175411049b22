"""Workloads of token ids, and their file: JSON lines, one request each.

    {"prompt": [5, 17, ...], "max_tokens": 40}

Every engine generates exactly ``max_tokens`` for each (end-of-text tokens are ignored), greedily,
so that all do the same work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

Workload = list[tuple[list[int], int]]
"""Prompts, and how many tokens follow each."""

_FIRST_ID = 3
"""Ids below are special in the checkpoints of ``make_model.py``."""


def lognormal_lengths(rows: int, vocab_size: int, seed: int) -> Workload:
    """Prompts of 64 tokens and outputs of 32 in the median, both lognormal with a long tail, up to
    256 and 192."""
    random = Random(f"lognormal {seed}")
    return [
        (
            _ids(random, vocab_size, _length(random, 64, 0.7, 8, 256)),
            _length(random, 32, 0.8, 4, 192),
        )
        for _ in range(rows)
    ]


def shared_prefix(rows: int, vocab_size: int, seed: int) -> Workload:
    """256 tokens that all prompts begin with, other ones for each seed, then 24 of their own in the
    median; outputs of 32 in the median."""
    random = Random(f"shared {seed}")
    prefix = _ids(random, vocab_size, 256)
    return [
        (
            prefix + _ids(random, vocab_size, _length(random, 24, 0.5, 4, 96)),
            _length(random, 32, 0.8, 4, 192),
        )
        for _ in range(rows)
    ]


WORKLOADS: dict[str, Callable[[int, int, int], Workload]] = {
    "lognormal": lognormal_lengths,
    "shared-prefix": shared_prefix,
}


def write(path: Path, workload: Sequence[tuple[list[int], int]]) -> None:
    """Write the file."""
    lines = [json.dumps({"prompt": ids, "max_tokens": length}) for ids, length in workload]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _length(random: Random, median: float, sigma: float, least: int, most: int) -> int:
    return max(least, min(most, round(random.lognormvariate(math.log(median), sigma))))


def _ids(random: Random, vocab_size: int, length: int) -> list[int]:
    return [random.randrange(_FIRST_ID, vocab_size) for _ in range(length)]
