"""What torch finds on this machine, in words and numbers; for ``batchrun doctor``."""

from __future__ import annotations

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
