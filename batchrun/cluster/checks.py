"""What ``batchrun doctor`` looks at: each thing a run needs is ok, missing or wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from batchrun.errors import BatchrunError

_GIB = 2**30


class CheckState(StrEnum):
    """How a check ended. Only ``failed`` keeps a run from working."""

    OK = "ok"
    MISSING = "missing"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: what was found, and what to do when it is not ok."""

    name: str
    state: CheckState
    found: str
    advice: str = ""


def run_checks(url: str | None, *, start_ray: bool) -> Iterator[Check]:
    """Every check, one after the other. ``url`` is an output to try; ``start_ray`` starts and
    stops a Ray on this machine, which takes some seconds."""
    yield _python()
    yield from _guarded("torch", _torch)
    yield from _guarded("memory", _memory)
    yield from _guarded("ray", lambda: _ray(start_ray))
    yield from _guarded("embedded model", _model)
    yield from _guarded("object storage", lambda: _storage(url))
    yield _license()


def _guarded(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from check()
    except BatchrunError as error:
        yield Check(name, CheckState.FAILED, error.message, error.hint)
    except Exception as error:  # a broken installation fails in many ways; each is a finding
        yield Check(
            name,
            CheckState.FAILED,
            f"{type(error).__name__}: {error}",
            "reinstall: pip install -c constraints.txt -e .",
        )


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", CheckState.OK, f"{version} at {sys.executable}")


def _torch() -> Iterator[Check]:
    from batchrun.engine.machine import inspect_machine

    machine = inspect_machine()
    threads = f"{machine.num_threads} thread{'s' if machine.num_threads != 1 else ''}"
    yield Check("torch", CheckState.OK, f"{machine.torch_version}, {threads}")
    if machine.gpus:
        yield Check("cuda", CheckState.OK, str(machine.cuda_version))
    elif machine.cuda_version:
        advice = "check the driver with nvidia-smi; without a GPU runs use the CPU"
        yield Check("cuda", CheckState.MISSING, "torch has CUDA but sees no GPU", advice)
    else:
        advice = "runs use the CPU; for a GPU install the CUDA build of torch"
        yield Check("cuda", CheckState.MISSING, "this torch is a CPU build", advice)
    for index, gpu in enumerate(machine.gpus):
        memory = f"{gpu.free_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB free"
        capability = ".".join(map(str, gpu.compute_capability))
        state = CheckState.OK if gpu.free_bytes > gpu.total_bytes / 2 else CheckState.MISSING
        advice = "" if state is CheckState.OK else "another process holds the memory; end it"
        yield Check(f"gpu {index}", state, f"{gpu.name}, sm {capability}, {memory}", advice)
    state = CheckState.MISSING if machine.ops_hint else CheckState.OK
    yield Check("operators", state, machine.ops, machine.ops_hint)


def _memory() -> Iterator[Check]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state = CheckState.OK if total >= 2 * _GIB else CheckState.MISSING
    advice = "" if state is CheckState.OK else "a local run needs about 2 GiB"
    cpus = os.cpu_count() or 1
    yield Check("machine", state, f"{cpus} CPUs, {total / _GIB:.1f} GiB of memory", advice)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    state = CheckState.OK if free >= _GIB else CheckState.FAILED
    advice = "" if state is CheckState.OK else "free some space, or set TMPDIR to another disk"
    yield Check("temporary space", state, f"{free / _GIB:.1f} GiB free in {folder}", advice)


def _ray(start: bool) -> Iterator[Check]:
    import ray

    found = str(ray.__version__)
    if address := os.environ.get("RAY_ADDRESS"):
        found += f", RAY_ADDRESS={address}"
    if start:
        from batchrun.cluster.session import ray_session

        with ray_session(None, 1, {}) as capacity:
            found += f"; started and stopped here: {capacity}"
    yield Check("ray", CheckState.OK, found)


def _model() -> Iterator[Check]:
    from batchrun.data.checkpoints import find_checkpoint
    from batchrun.model.checkpoint import check_checkpoint

    check_checkpoint(find_checkpoint("tiny"))
    yield Check("embedded model", CheckState.OK, "`tiny` is complete")


def _license() -> Check:
    return Check(
        "model licence",
        CheckState.OK,
        "`tiny` is Apache-2.0; a checkpoint that you bring has its own",
        "NVIDIA Open Model License: pass a model on, or one made from it, only with a copy of the "
        "agreement and its notice; outputs are not claimed; do not bypass guardrails without a "
        "substitute. This is a summary: read the licence itself",
    )


def _storage(url: str | None) -> Iterator[Check]:
    version = importlib.metadata.version("s3fs")
    if url is None:
        advice = "`batchrun doctor s3://bucket/prefix` tries a write there"
        yield Check("object storage", CheckState.OK, f"s3fs {version}; nothing tried", advice)
        return
    from batchrun.data.store import Store

    Store.open(url).probe()
    yield Check("object storage", CheckState.OK, f"{url} is writable and creates only once")
