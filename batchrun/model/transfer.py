"""Numbers between host and device, without either waiting for the other.

A copy from ordinary memory to a GPU waits until the GPU has done all that it was given before. One
from pinned memory is only put in line. The memory may be let go at once: torch gives no pinned
memory out again before the copies from and to it are over. On a CPU all of this is plain tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def stage(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor in host memory of (nested) numbers, from which a copy to ``device`` is not waited
    for."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(
    values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """A tensor on ``device`` of (nested) numbers."""
    return stage(values, device, dtype).to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host, from when this is made."""

    __slots__ = ("_event", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor in host memory, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
