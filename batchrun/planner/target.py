"""Finding the device that a plan is for: by name, from a bench file, or this machine."""

from __future__ import annotations

from pathlib import Path

from batchrun.engine.accelerators import find_accelerator
from batchrun.errors import CheckpointError
from batchrun.job import Job
from batchrun.planner.benchfile import read_bench, with_bench
from batchrun.planner.device import Target, plan_device
from batchrun.preflight import ReadCheckpoint


def find_target(
    job: Job,
    checkpoint: ReadCheckpoint,
    accelerator: str | None = None,
    bench: Path | None = None,
) -> Target:
    """The device that is asked for: ``accelerator``, else that of the job, else that of the bench
    file, else this machine.

    Raises RequestError for an accelerator that is not known or is not that of the bench file,
    CheckpointError where the model does not fit.
    """
    measured = None if bench is None else read_bench(bench)
    name = accelerator or job.resources.accelerator_type
    if name is None and measured is not None and measured["device"] != "cpu":
        name = str(measured["accelerator"])
    if name is not None:
        target = plan_device(job, checkpoint, find_accelerator(name))
        if measured is None:
            return target
        return with_bench(target, checkpoint, measured, str(bench))
    from batchrun.planner.here import plan_cpu, plan_here  # loads torch, which takes seconds

    if measured is not None:
        return plan_cpu(job, checkpoint, measured, str(bench))
    try:
        return plan_here(job, checkpoint)
    except CheckpointError as error:
        hint = f"{error.hint}; or plan for another device with --accelerator"
        raise CheckpointError(f"on this machine {error.message}", hint) from error
