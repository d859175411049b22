"""Accelerators by name, mostly from data sheets: for plans on a machine that has none."""

from __future__ import annotations

import re
from dataclasses import dataclass

from batchrun.errors import RequestError
from batchrun.wording import nearest

_GIB = 2**30
CONTEXT_BYTES = 460 << 20
"""What CUDA, its libraries and loaded kernels take before anything is allocated: an estimate."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device. ``memory_bytes`` is what torch sees of its memory, ``bandwidth`` bytes a second,
    ``flops`` dense bfloat16 operations a second, both at their peak."""

    name: str
    memory_bytes: int
    bandwidth: float
    flops: float

    @property
    def usable_bytes(self) -> int:
        """What is left to an engine that has the device to itself."""
        return self.memory_bytes - CONTEXT_BYTES - margin_bytes(self.memory_bytes)


def margin_bytes(memory_bytes: int) -> int:
    """What an engine leaves of a device's memory: pools are allocated once and in one piece, so
    that little is lost to fragmentation."""
    return memory_bytes // 100


ACCELERATORS = (
    Accelerator("A10", int(22.06 * _GIB), 600e9, 125e12),
    Accelerator("A10G", int(22.06 * _GIB), 600e9, 125e12),
    Accelerator("L4", int(22.03 * _GIB), 300e9, 121e12),
    Accelerator("L40S", int(44.4 * _GIB), 864e9, 362e12),
    Accelerator("A100-40G", int(39.4 * _GIB), 1555e9, 312e12),
    Accelerator("A100-80G", int(79.1 * _GIB), 2039e9, 312e12),
    Accelerator("H100", int(79.1 * _GIB), 3350e9, 989e12),
    # As measured on long copies and large products; the data sheet says 4.8 TB/s and 989 TFLOP/s.
    Accelerator("H200", int(139.8 * _GIB), 4300e9, 790e12),
)
"""Names are those of Ray's ``accelerator_type``, as far as it has them."""


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of a name, in any case, with or without the maker's; "A100" is the smaller.

    :raises RequestError: it is none of :data:`ACCELERATORS`.
    """
    bare = re.sub(r"^((nvidia|tesla)[ _-]+)*", "", name.strip().lower())
    bare = {"a100": "a100-40g", "a100-40gb": "a100-40g", "a100-80gb": "a100-80g"}.get(bare, bare)
    known = {accelerator.name.lower(): accelerator for accelerator in ACCELERATORS}
    if bare in known:
        return known[bare]
    close = known.get(nearest(bare, known))
    raise RequestError(
        f"accelerator {name!r} is not known" + (f"; did you mean {close.name}?" if close else ""),
        f"use one of {', '.join(accelerator.name for accelerator in ACCELERATORS)}",
    )
