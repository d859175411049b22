"""This machine as the device of a plan: its GPU by name, or its CPU after a short measurement.

Loads torch. A small model's engine is measured itself, with random weights; of a big model only
the sizes of its matrices.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from batchrun.bench import Workload, run_bench
from batchrun.engine.accelerators import Accelerator, find_accelerator
from batchrun.engine.machine import describe_device
from batchrun.engine.memory import plan_memory
from batchrun.engine.options import EngineOptions
from batchrun.engine.rates import measure_rates
from batchrun.errors import RequestError
from batchrun.job import Job
from batchrun.planner.benchfile import BENCH_SPREAD, with_rates
from batchrun.planner.device import (
    DECODE_RATIO,
    Ratio,
    Target,
    plan_device,
    precision_of,
    wishes_of,
)
from batchrun.planner.outputs import Range
from batchrun.preflight import ReadCheckpoint

_SPREAD = (0.5, 0.9, 1.2)
"""Around a measurement of a moment: a run has a pipeline, and others run beside it."""
_MEASURED_BYTES = 256 << 20
"""Weights of a model whose engine is measured itself."""
_BATCHES = (1, 8, 32, 64)
_PREFILL_ROWS = 256
_SAID = "this machine just now"


def plan_here(job: Job, checkpoint: ReadCheckpoint) -> Target:
    """The device that an engine would take here.

    Raises RequestError for a GPU that no data sheet is known of, CheckpointError where the model
    does not fit.
    """
    options = EngineOptions()
    if options.torch_device.type == "cuda":
        name = describe_device(options.torch_device).name
        try:
            return plan_device(job, checkpoint, find_accelerator(name))
        except RequestError as error:
            hint = f"{error.hint}, with --accelerator"
            raise RequestError(f"this machine's {error.message}", hint) from error
    target, options = _cpu(job, checkpoint)
    if target.memory.weight_bytes <= _MEASURED_BYTES:
        document = _measure(checkpoint.folder, options, target.memory.max_sequences)
        return with_rates(target, checkpoint, document, _SAID, _SPREAD)
    batch = target.memory.max_sequences
    rates = measure_rates(
        checkpoint.config,
        options.torch_dtype,
        options.torch_device,
        sorted({batch, _PREFILL_ROWS}),
        seconds=0.1,
    )
    size, bandwidth = target.memory.memory_bytes, rates.copy_bandwidth
    share = Ratio(DECODE_RATIO, "assumed, of what copies and matrices reach here just now")
    return replace(
        target,
        basis=f"{bandwidth / 1e9:,.1f} GB/s, {rates.matmul_flops[_PREFILL_ROWS] / 1e9:,.0f} "
        "GFLOP/s (measured)",
        decode_device=Accelerator("CPU", size, bandwidth, rates.matmul_flops[batch]),
        prefill_device=Accelerator("CPU", size, bandwidth, rates.matmul_flops[_PREFILL_ROWS]),
        decode=share,
        prefill=share,
    )


def plan_cpu(
    job: Job, checkpoint: ReadCheckpoint, measured: Mapping[str, Any], path: str
) -> Target:
    """A CPU as a bench file has it, with the memory that is free here.

    Raises CheckpointError where the model does not fit.
    """
    target = replace(_cpu(job, checkpoint)[0], name=str(measured["accelerator"]))
    return with_rates(target, checkpoint, measured, path, BENCH_SPREAD)


def _cpu(job: Job, checkpoint: ReadCheckpoint) -> tuple[Target, EngineOptions]:
    """This CPU before its rates are known, with the memory that a worker's share of it is."""
    precision, dtype, state_dtype = precision_of(job, is_gpu=False)
    num_cpus = os.cpu_count() or 1
    workers = min(job.resources.most_workers, num_cpus)
    options = EngineOptions(
        dtype=dtype,
        state_dtype=state_dtype,
        quantization=job.model.quantization,
        device="cpu",
        num_threads=max(1, num_cpus // workers),
    )
    wishes: dict[str, Any] = wishes_of(job, checkpoint)
    share = options.free_memory_bytes() // workers
    request = replace(options.memory_request(0), memory_bytes=share, **wishes)
    device = Accelerator("CPU", share, 1.0, 1.0)
    unknown = Ratio(Range(1.0, 1.0, 1.0), "")
    target = Target(
        name=describe_device(options.torch_device).name,
        basis="",
        is_gpu=False,
        precision=precision,
        dtype=dtype,
        state_dtype=state_dtype,
        memory=plan_memory(checkpoint.config, request),
        decode_device=device,
        prefill_device=device,
        decode=unknown,
        prefill=unknown,
        num_cpus=num_cpus,
    )
    return target, options


def _measure(folder: Path, options: EngineOptions, max_sequences: int) -> Mapping[str, Any]:
    """A bench document of the engine with random weights, at one batch size, in about a second."""
    batch = max(batch for batch in _BATCHES if batch <= max_sequences)
    workload = Workload((batch,), prompt_tokens=64, decode_steps=8)
    with TemporaryDirectory(prefix="batchrun-plan-") as scratch:
        shutil.copyfile(folder / "config.json", Path(scratch) / "config.json")
        report = run_bench(
            Path(scratch), replace(options, random_weights=True), workload, rate_seconds=0.05
        )
    document: Mapping[str, Any] = json.loads(json.dumps(report.document()))
    return document
