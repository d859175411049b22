"""The operators that a GPU has better ways to compute, and the one place that chooses.

:class:`Ops` is the interface. :class:`~batchrun.model.ops.plain.PlainOps` implements it in plain
PyTorch, on any device: it is what every faster implementation is tested against.
:class:`~batchrun.model.ops.native.NativeOps` are compiled for the CPU that they run on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from batchrun.model.config import ModelConfig
from batchrun.model.layout import AttentionLayout, PrefillLayout
from batchrun.model.ops import native
from batchrun.model.ops.build import NoCompiler, load_library
from batchrun.model.ops.plain import PlainOps


class Ops(Protocol):
    """What a model needs beyond matrix products.

    Letters as in the Mamba-2 paper: h heads of size p, g groups of B and C, state size n; D
    decodes, T tokens, c conv channels, K the conv kernel. States are updated in place, in their
    own dtype; arithmetic is float32; results have the dtype of the first argument. ``dt`` is raw:
    the operator adds ``dt_bias`` and applies softplus. ``skip`` is the paper's D.
    """

    rectangles: bool
    """Whether layouts must have ``waves`` and ``groups``; see :func:`lay_out`."""

    def conv_update(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
    ) -> Tensor:
        """One token a sequence: x [D, c], weight [c, K], state [slots, K - 1, c] -> [D, c].

        Causal depthwise convolution and SiLU.
        """

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, layout: PrefillLayout
    ) -> Tensor:
        """The same for packed prefills: x [T, c] -> [T, c]."""

    def ssm_update(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        dt_bias: Tensor,
        skip: Tensor,
        state: Tensor,
        slots: Tensor,
    ) -> Tensor:
        """One step of the recurrence a sequence.

        x [D, h, p], dt [D, h], B and C [D, g, n], A, dt_bias and skip [h],
        state [slots, h, p, n] -> y [D, h, p].
        """

    def ssd_scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        dt_bias: Tensor,
        skip: Tensor,
        state: Tensor,
        layout: PrefillLayout,
    ) -> Tensor:
        """The recurrence over all tokens of packed prefills: x [T, h, p] -> y [T, h, p]."""

    def add_norm(self, h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add ``delta`` to ``h``, in place, and give the RMS norm of the sum: all [T, hidden].

        The sum is rounded to the dtype of ``h`` first. None adds nothing.
        """

    def gated_norm(
        self, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
    ) -> Tensor:
        """RMS norm of ``y * silu(z)`` over groups of channels: [T, inner] -> [T, inner]."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Write k and v [T, kv heads, d] to the pools [blocks, block_size, kv heads, d], then
        attend causally: q [T, heads, d] -> [T, heads, d]."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The operators chosen for a device, and why, in words for a person."""

    ops: Ops
    reason: str


def select_ops(device: torch.device, config: ModelConfig | None = None) -> Selection:
    """The operators for ``device`` and, if given, a model of ``config``.

    On a CPU they are compiled for it where that is possible, which may take some seconds.
    """
    if device.type != "cpu":
        return Selection(PlainOps(), f"plain PyTorch operators on {device.type}")
    reason = None if config is None else native.problem(config)
    if reason is None:
        try:
            return Selection(
                native.NativeOps(load_library()), "operators compiled for this CPU (native.cpp)"
            )
        except NoCompiler as error:
            reason = str(error)
    return Selection(PlainOps(), f"plain PyTorch operators on cpu; not compiled ones: {reason}")
