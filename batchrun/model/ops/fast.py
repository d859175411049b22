"""The operators as Triton kernels; see :class:`batchrun.model.ops.Ops` for shapes and meaning.

Scan, decode update and gated norm are mamba-ssm's kernels; convolution, attention, the norm with
its addition and the passing of states are this package's. All of them take lengths, slots and
tables from the device and never wait for it, so a step of decodes can be captured in a CUDA graph.

Needs triton: import it only where :func:`~batchrun.model.ops.mamba_kernels.find_obstacle` finds
nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from batchrun.model.layout import AttentionLayout, PrefillLayout
from batchrun.model.ops.conv_kernels import (
    causal_conv_kernel,
    conv_state_kernel,
    conv_update_kernel,
)
from batchrun.model.ops.int8_kernels import MAX_TOKENS, int8_linear
from batchrun.model.ops.mamba_kernels import MambaKernels
from batchrun.model.ops.paged_attention import attend_decodes, attend_prefills
from batchrun.model.ops.scan_kernels import add_norm_kernel, pass_states_kernel
from batchrun.model.quantize import int8_linear as widened_linear

_NO_STEP = -1e4
"""A raw dt whose softplus is zero: a token that changes neither output nor state."""


class TritonOps:
    """Operators in Triton, for one GPU, or for CPU tensors under Triton's interpreter.

    ``num_processors`` of the GPU decide into how many pieces a context is cut.
    """

    rectangles = False

    def __init__(self, kernels: MambaKernels, num_processors: int) -> None:
        self._kernels = kernels
        self._num_processors = num_processors

    def conv_update(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
    ) -> Tensor:
        """One launch for all decodes and channels."""
        num_decodes, channels = x.shape
        x = _dense_rows(x)
        out = x.new_empty(num_decodes, channels)
        block = _block(channels, 1024)
        with _device_of(x):
            conv_update_kernel[num_decodes, triton.cdiv(channels, block)](
                x,
                weight,
                bias,
                state,
                slots,
                out,
                channels,
                x.stride(0),
                *weight.stride(),
                state.stride(0),
                state.stride(1),
                out.stride(0),
                HAS_BIAS=bias is not None,
                KERNEL=weight.shape[1],
                BLOCK=block,
            )
        return out

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, layout: PrefillLayout
    ) -> Tensor:
        """One launch for the outputs, then one for the new states."""
        num_tokens, channels = x.shape
        x = _dense_rows(x)
        out = x.new_empty(num_tokens, channels)
        block_tokens, block = 16, _block(channels, 128)
        num_blocks = triton.cdiv(channels, block)
        with _device_of(x):
            causal_conv_kernel[triton.cdiv(num_tokens, block_tokens), num_blocks](
                x,
                weight,
                bias,
                state,
                out,
                layout.slots,
                layout.is_new,
                layout.sequences,
                layout.starts,
                num_tokens,
                channels,
                x.stride(0),
                *weight.stride(),
                state.stride(0),
                state.stride(1),
                out.stride(0),
                HAS_BIAS=bias is not None,
                KERNEL=weight.shape[1],
                BLOCK_TOKENS=block_tokens,
                BLOCK=block,
            )
            conv_state_kernel[len(layout.slots), num_blocks](
                x,
                state,
                layout.slots,
                layout.is_new,
                layout.starts,
                channels,
                x.stride(0),
                state.stride(0),
                state.stride(1),
                KERNEL=weight.shape[1],
                BLOCK=block,
            )
        return out

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
        """mamba-ssm's update, in place by slot.

        What all numbers of a head share is expanded with strides of 0, by which the kernel knows
        that it needs one exponential a head.
        """
        head_dim, state_size = state.shape[2:]
        with _device_of(x):
            y: Tensor = self._kernels.state_update(
                state,
                x,
                dt[..., None].expand(-1, -1, head_dim),
                A[:, None, None].expand(-1, head_dim, state_size),
                B,
                C,
                D=skip[:, None].expand(-1, head_dim),
                dt_bias=dt_bias[:, None].expand(-1, head_dim),
                dt_softplus=True,
                state_batch_indices=slots,
            )
        return y

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
        """mamba-ssm's kernels for what happens inside chunks, our own between them.

        Every sequence begins a chunk, so that no chunk holds tokens of two and each sequence goes
        on from its own state; states between chunks stay float32.
        """
        kernels, chunk_size = self._kernels, layout.chunk_size
        num_heads, head_dim, state_size = *x.shape[1:], B.shape[2]
        # One sequence alone is in its place already: the kernels mask the end of the last chunk.
        is_packed = len(layout.slots) > 1
        if is_packed:
            num_cells = layout.num_chunks * chunk_size

            def to_cells(tokens: Tensor, fill: float = 0.0) -> Tensor:  # [T, ...] -> [C * Q, ...]
                cells = tokens.new_full((num_cells, *tokens.shape[1:]), fill)
                return cells.index_copy_(0, layout.token_cells, tokens)

            x, B, C, dt = to_cells(x), to_cells(B), to_cells(C), to_cells(dt, _NO_STEP)
        x, dt, B, C = x[None], dt[None], B[None], C[None]  # a batch of one
        with _device_of(x):
            sums, steps = kernels.chunk_cumsum(
                dt, A, chunk_size, dt_bias=dt_bias, dt_softplus=True
            )  # [1, h, C, Q] each, float32
            states = kernels.chunk_state(B, x, steps, sums, states_in_fp32=True)  # [1, C, h, p, n]
            size = head_dim * state_size
            block = _block(size, 1024)
            pass_states_kernel[len(layout.slots), num_heads, triton.cdiv(size, block)](
                states,
                sums,
                state,
                layout.slots,
                layout.is_new,
                layout.first_chunks,
                size,
                chunk_size,
                states.stride(1),
                states.stride(2),
                sums.stride(1),
                sums.stride(2),
                state.stride(0),
                state.stride(1),
                BLOCK=block,
            )
            scores = kernels.bmm_chunk(C, B, chunk_size, output_dtype=torch.float32)
            y, _ = kernels.chunk_scan(scores, x, steps, sums, C, states, D=skip)
        tokens: Tensor = y[0]
        return tokens.index_select(0, layout.token_cells) if is_packed else tokens

    def add_norm(self, h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """A row a program."""
        num_tokens, size = h.shape
        out = torch.empty_like(h)
        block = triton.next_power_of_2(size)
        with _device_of(h):
            add_norm_kernel[num_tokens,](
                h,
                delta,
                weight,
                out,
                size,
                eps,
                h.stride(0),
                delta.stride(0) if delta is not None else 0,
                out.stride(0),
                HAS_DELTA=delta is not None,
                BLOCK=block,
                num_warps=min(16, max(1, block // 512)),
            )
        return out

    def gated_norm(
        self, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
    ) -> Tensor:
        """mamba-ssm's: gate first, norm second, the weight in float32, rounded once."""
        with _device_of(y):
            out, _, _ = self._kernels.gated_norm(
                y,
                weight,
                None,
                eps,
                z=z,
                group_size=group_size,
                norm_before_gate=False,
                is_rms_norm=True,
            )
        normed: Tensor = out
        return normed

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Keys and values are written to their pages first; then everything is read from there."""
        keys.flatten(0, 1).index_copy_(0, layout.write_rows, k)
        values.flatten(0, 1).index_copy_(0, layout.write_rows, v)
        out = q.new_empty(q.shape)
        with _device_of(q):
            if layout.num_decodes:
                attend_decodes(q, keys, values, out, layout, self._num_processors)
            if layout.longest_prefill:
                attend_prefills(q, keys, values, out, layout)
        return out

    def int8_linear(self, x: Tensor, integers: Tensor, scale: Tensor, out: Tensor) -> None:
        """As :func:`batchrun.model.quantize.int8_linear`, which takes over where the weights are
        used so often that reading them matters no more."""
        if len(x) > MAX_TOKENS:
            widened_linear(x, integers, scale, out)
            return
        with _device_of(x):
            int8_linear(_dense_rows(x), integers, scale, out)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _dense_rows(x: Tensor) -> Tensor:
    """[T, c] whose rows are contiguous, as the parts of a projection are."""
    return x if x.stride(1) == 1 else x.contiguous()


def _block(size: int, largest: int) -> int:
    return min(largest, int(triton.next_power_of_2(size)))
