"""How much a response format costs: tokens a second of the engine, bound against free.

    python scripts/bench/structured.py [--batch 64] [--rounds 8]

The embedded model answers the same prompts without reasoning, in turns: as many tokens without a
format, and bound to one that as many tokens fit into. What is compared is the fastest round of
each: whatever else runs on the machine only makes rounds slower.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from batchrun.data.checkpoints import find_checkpoint
from batchrun.engine.engine import Engine
from batchrun.engine.options import EngineOptions
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.records import Message

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["person", "place", "thing"]},
        "size": {"type": "number", "minimum": 0, "maximum": 1000},
    },
    "required": ["name", "kind", "size"],
    "additionalProperties": False,
}
FORMATS: dict[str, Mapping[str, Any]] = {
    "json_schema": {
        "type": "json_schema",
        "schema": {"type": "array", "items": RECORD, "minItems": 100},
    },
    "regex": {"type": "regex", "pattern": "([a-z]{1,12} [0-9]{1,6}, ){1000}"},
}


def tokens_per_second(
    engine: Engine, bound_to: Mapping[str, Any] | None, *, batch: int, num_tokens: int
) -> float:
    """Sampled tokens a second of a full batch, from the first decode on."""
    assert engine.chat is not None
    prompt = engine.chat.encode([Message("user", "What is 3+4?")], reasoning=False)
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, response_format=bound_to)
    for number in range(batch):
        engine.add(Request(number, prompt.token_ids, params, seed=number))
    engine.step()  # the prompts, and whatever is made but once
    before, started = engine.stats().sampled_tokens, time.perf_counter()
    while engine.num_unfinished:
        engine.step()
    return (engine.stats().sampled_tokens - before) / (time.perf_counter() - started)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    engine = Engine.load(
        find_checkpoint("tiny"), EngineOptions(device="cpu", max_sequences=options.batch)
    )
    ways: dict[str, Mapping[str, Any] | None] = {"free": None, **FORMATS}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, bound_to in ways.items():
            speed = tokens_per_second(
                engine, bound_to, batch=options.batch, num_tokens=options.tokens
            )
            speeds[name].append(speed)
    free = max(speeds["free"])
    for name in ways:
        speed = max(speeds[name])
        print(f"{name:12} {speed:8.0f} tokens/s   {speed / free:5.2f} of free")


if __name__ == "__main__":
    main()
