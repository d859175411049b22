"""The device that a plan is for: how its memory is divided, and how near to its bounds it comes."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.engine.accelerators import Accelerator
from batchrun.engine.memory import MemoryPlan, expected_tokens, plan_accelerator
from batchrun.engine.thinking import ForcedClose
from batchrun.job import Job
from batchrun.model.sizes import Precision, Quantization
from batchrun.planner.outputs import Range
from batchrun.preflight import ReadCheckpoint

DECODE_RATIO = Range(0.60, 0.72, 0.85)
"""Of the bandwidth bound: what good engines reach on a GPU."""
PREFILL_RATIO = Range(0.48, 0.56, 0.64)
"""Of a data sheet's arithmetic: a 150 W card sustains 60 to 80 of its 125 TFLOP/s."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Which part of the bound is reached, and how that is known."""

    share: Range
    basis: str


@dataclass(frozen=True, slots=True)
class Target:
    """The device of one worker.

    ``decode_device`` and ``prefill_device`` have the rates that bounds are made of; ``prefill`` and
    ``decode`` say how near to them. ``num_cpus`` is set where workers share this machine's CPUs.
    ``dtype`` and ``state_dtype`` are words.
    """

    name: str
    basis: str
    is_gpu: bool
    precision: Precision
    dtype: str
    state_dtype: str
    memory: MemoryPlan
    decode_device: Accelerator
    prefill_device: Accelerator
    decode: Ratio
    prefill: Ratio
    num_cpus: int | None = None
    notes: tuple[str, ...] = ()


def precision_of(job: Job, *, is_gpu: bool) -> tuple[Precision, str, str]:
    """What numbers are held in: as sizes, and the types of weights and SSM state in words."""
    dtype, state = job.model.dtype, job.model.state_dtype
    if dtype == "auto":
        dtype = "bfloat16" if is_gpu else "float32"
    if state == "auto":
        state = "float32"
    size = {"bfloat16": 2, "float32": 4}
    quantization = Quantization(job.model.quantization)
    return Precision(size[dtype], size[state], quantization), dtype, state


def wishes_of(job: Job, checkpoint: ReadCheckpoint) -> dict[str, int | None]:
    """What a worker asks of the memory plan."""
    wanted = job.resources.max_sequences
    return {
        "max_model_len": job.model.max_model_len,
        "max_sequences": None if wanted == "auto" else wanted,
        "sequence_tokens": expected_tokens(job.generation.max_tokens),
        "num_forced": ForcedClose(checkpoint.tokenizer.encode_plain).max_tokens,
    }


def plan_device(job: Job, checkpoint: ReadCheckpoint, device: Accelerator) -> Target:
    """An accelerator of the data sheets.

    Raises CheckpointError where the model, or one sequence of the length asked for, does not fit.
    """
    precision, dtype, state_dtype = precision_of(job, is_gpu=True)
    return Target(
        name=device.name,
        basis=f"{device.bandwidth / 1e9:,.0f} GB/s, {device.flops / 1e12:,.0f} TFLOP/s bfloat16 "
        "(data sheet)",
        is_gpu=True,
        precision=precision,
        dtype=dtype,
        state_dtype=state_dtype,
        memory=plan_accelerator(checkpoint.config, device, precision, **wishes_of(job, checkpoint)),
        decode_device=device,
        prefill_device=device,
        decode=Ratio(DECODE_RATIO, "assumed: what good engines reach of the bandwidth"),
        prefill=Ratio(PREFILL_RATIO, "assumed: what cards sustain of the data sheet's arithmetic"),
    )
