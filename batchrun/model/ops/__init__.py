"""The operators that a GPU has better ways to compute, and the one place that chooses.

:class:`Ops` is the interface. :class:`~batchrun.model.ops.plain.PlainOps` implements it in plain
PyTorch, on any device: it is what every faster implementation is tested against.
:class:`~batchrun.model.ops.native.NativeOps` are compiled for the CPU that they run on,
:class:`~batchrun.model.ops.fast.TritonOps` are Triton kernels for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

import torch
from torch import Tensor

from batchrun.model.config import ModelConfig
from batchrun.model.layout import AttentionLayout, PrefillLayout
from batchrun.model.ops import mamba_kernels, native
from batchrun.model.ops.build import NoCompiler, load_library
from batchrun.model.ops.plain import PlainOps

_MIN_CAPABILITY = (8, 0)
"""Of the GPU: bfloat16 products."""


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
    """The operators chosen for a device, and why, in words for a person.

    ``hint`` says how to come by better ones, where there are better ones.
    """

    ops: Ops
    reason: str
    hint: str = ""


def select_ops(
    device: torch.device, config: ModelConfig | None = None, *, deterministic: bool = False
) -> Selection:
    """The operators for ``device`` and, if given, a model of ``config``.

    On a CPU they are compiled for it where that is possible, which may take some seconds. On a GPU
    they are Triton kernels where these can be used; whether they can be compiled is tried with the
    smallest of them. ``deterministic`` takes fixed configurations of the kernels instead of the
    fastest ones, which may differ from one process to the next.
    """
    if device.type == "cuda":
        return _select_gpu_ops(device, deterministic)
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


def _select_gpu_ops(device: torch.device, deterministic: bool) -> Selection:
    obstacle = mamba_kernels.find_obstacle()
    capability = torch.cuda.get_device_capability(device)
    if obstacle is None and capability < _MIN_CAPABILITY:
        wanted, found = (".".join(map(str, numbers)) for numbers in (_MIN_CAPABILITY, capability))
        obstacle = mamba_kernels.Obstacle(
            f"the kernels need compute capability {wanted} and this GPU has {found}",
            "use an Ampere GPU or a newer one",
        )
    if obstacle is not None:
        return _plain(device, obstacle)
    try:
        # Imported here, because triton need not be installed.
        from batchrun.model.ops.fast import TritonOps

        kernels = mamba_kernels.load_kernels(deterministic=deterministic)
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        ops = TritonOps(kernels, num_processors)
        _try_out(ops, device)
    except Exception as error:  # a compiler that is missing or too old fails in many ways
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        return _plain(
            device,
            mamba_kernels.Obstacle(
                f"the kernels cannot be compiled here ({first_line})",
                "Triton needs a C compiler (gcc) and Python's headers: on Debian or Ubuntu "
                "apt-get install gcc python3-dev",
            ),
        )
    versions = f"triton {version('triton')}, mamba-ssm {version('mamba-ssm')}"
    return Selection(ops, f"Triton kernels on {device.type} ({versions})")


def _plain(device: torch.device, obstacle: mamba_kernels.Obstacle) -> Selection:
    reason = f"plain PyTorch operators on {device.type}, many times slower: {obstacle.reason}"
    return Selection(PlainOps(), reason, obstacle.hint)


def _try_out(ops: Ops, device: torch.device) -> None:
    """Raises what compiling and launching a kernel raises, or ``RuntimeError`` for a result that is
    not that of the plain operators."""
    x = torch.ones(1, 16, device=device)
    weight, state = x.expand(4, -1).t().contiguous(), x.new_ones(2, 3, 16)
    slots = torch.ones(1, dtype=torch.int64, device=device)
    expected = PlainOps().conv_update(x, weight, None, state.clone(), slots)
    found = ops.conv_update(x, weight, None, state, slots)
    if not torch.allclose(found, expected, rtol=1e-4):
        raise RuntimeError("a kernel gives wrong results")
