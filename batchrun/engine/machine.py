"""What torch finds on this machine, in words and numbers."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from batchrun.model.ops import select_ops


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that torch can use. Memory in bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """Torch, its GPUs, and the operators that the engine would use here, with the reason and what
    would bring better ones (empty: there are none)."""

    torch_version: str
    cuda_version: str | None
    gpus: tuple[Gpu, ...]
    num_threads: int
    ops: str
    ops_hint: str


def inspect_machine() -> Machine:
    """Look at this machine. Needs no GPU; on one, a small kernel is compiled and run."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            gpus.append(Gpu(name, total, free, torch.cuda.get_device_capability(index)))
    selection = select_ops(torch.device("cuda" if gpus else "cpu"))
    return Machine(
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda,
        gpus=tuple(gpus),
        num_threads=torch.get_num_threads(),
        ops=selection.reason,
        ops_hint=selection.hint,
    )


@dataclass(frozen=True, slots=True)
class Device:
    """What an engine runs on: the name of the GPU or CPU, its memory in bytes, and torch's threads
    on the host."""

    name: str
    memory_bytes: int
    torch_version: str
    num_threads: int


def describe_device(device: torch.device) -> Device:
    """Name and size of a device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, size = properties.name, properties.total_memory
    else:
        name, size = _cpu_name(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(name, size, torch.__version__, torch.get_num_threads())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
