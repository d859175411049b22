"""What ``batchrun bench`` measured, in place of what is assumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from batchrun.engine.accelerators import Accelerator, find_accelerator
from batchrun.errors import RequestError
from batchrun.planner.device import Ratio, Target
from batchrun.planner.outputs import Range
from batchrun.preflight import ReadCheckpoint

BENCH_SPREAD = (0.85, 1.0, 1.1)
"""Around what a bench file says: a run has prompts of all lengths, and is not measured alone."""


def read_bench(path: Path) -> Mapping[str, Any]:
    """What ``batchrun bench --output`` wrote.

    Raises RequestError for anything else.
    """
    hint = "write one with `batchrun bench --output FILE`"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"the bench file {path} cannot be read ({error})", hint) from error
    if not isinstance(document, dict) or document.get("format") != "batchrun-bench":
        raise RequestError(f"{path} is not a bench file", hint)
    if document.get("version") != 1:
        raise RequestError(f"{path} is a bench file of another version of batchrun", hint)
    try:
        if not document["batches"]:
            raise RequestError(f"the bench file {path} has no batch that fitted", hint)
        for one in document["batches"]:
            _ = one["batch"] + one["decode"]["ratio"] + one["prefill"]["ratio"]
        _ = {int(rows): float(r) for rows, r in document["rates"]["matmul_flops"].items()}
        _ = float(document["rates"]["copy_bytes_per_second"]), document["model"]["config"]
        _ = document["device"], document["accelerator"], int(document["memory_bytes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"the bench file {path} is damaged ({error!r})", hint) from error
    return document


def with_bench(
    target: Target, checkpoint: ReadCheckpoint, measured: Mapping[str, Any], path: str
) -> Target:
    """The same device with measured rates in place of assumed ones.

    Raises RequestError where the file is of another device.
    """
    try:
        # One card can have two names: A10 and A10G are alike.
        there = replace(find_accelerator(str(measured["accelerator"])), name=target.name)
        is_same = there == target.decode_device
    except RequestError:
        is_same = False
    if not is_same:
        raise RequestError(
            f"the bench file {path} is of {measured['accelerator']}, not of {target.name}",
            f"measure on {target.name}, or plan without --bench",
        )
    return with_rates(target, checkpoint, measured, path, BENCH_SPREAD)


def with_rates(
    target: Target,
    checkpoint: ReadCheckpoint,
    measured: Mapping[str, Any],
    path: str,
    spread: tuple[float, float, float],
) -> Target:
    """``target`` with the rates of a bench document, at the batch nearest to its own; ``spread``
    is how far off each may be."""
    batch = target.memory.max_sequences
    nearest = min(measured["batches"], key=lambda one: abs(one["batch"] - batch))
    flops = {int(rows): float(rate) for rows, rate in measured["rates"]["matmul_flops"].items()}
    bandwidth = float(measured["rates"]["copy_bytes_per_second"])
    at = nearest["batch"]
    decode_flops = flops[min(flops, key=lambda rows: abs(rows - at))]
    prefill_rows = at * int(measured["prompt_tokens"])
    prefill_flops = flops[min(flops, key=lambda rows: abs(rows - prefill_rows))]
    notes = list(target.notes)
    if measured["model"]["config"] != json.loads(json.dumps(asdict(checkpoint.config))):
        notes.append(
            f"{path} is of another model ({measured['model']['path']}): its shares of the bounds "
            "are taken over, not its tokens a second"
        )
    said = f"measured: {path}, at batch {at}"
    memory = target.memory.memory_bytes + target.memory.outside_bytes
    return replace(
        target,
        basis=f"{bandwidth / 1e9:,.1f} GB/s, {prefill_flops / 1e9:,.0f} GFLOP/s (measured)",
        decode_device=Accelerator(target.name, memory, bandwidth, decode_flops),
        prefill_device=Accelerator(target.name, memory, bandwidth, prefill_flops),
        decode=Ratio(_around(float(nearest["decode"]["ratio"]), spread), said),
        prefill=Ratio(_around(float(nearest["prefill"]["ratio"]), spread), said),
        notes=tuple(notes),
    )


def _around(value: float, spread: tuple[float, float, float]) -> Range:
    low, expected, high = (value * factor for factor in spread)
    return Range(low, expected, high)
