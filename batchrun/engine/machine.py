"""What torch finds on this machine, in words and numbers; for ``batchrun doctor``."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

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
    """Torch, its GPUs, and the operators that the engine would use here, with the reason."""

    torch_version: str
    cuda_version: str | None
    gpus: tuple[Gpu, ...]
    num_threads: int
    ops: str
    has_kernels: bool


def inspect_machine() -> Machine:
    """Look at this machine. Needs no GPU; allocates nothing."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            gpus.append(Gpu(name, total, free, torch.cuda.get_device_capability(index)))
    device = torch.device("cuda" if gpus else "cpu")
    return Machine(
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda,
        gpus=tuple(gpus),
        num_threads=torch.get_num_threads(),
        ops=select_ops(device).reason,
        has_kernels=all(importlib.util.find_spec(name) for name in ("mamba_ssm", "triton")),
    )
