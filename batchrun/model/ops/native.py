"""The operators for a CPU, compiled on it: each reads and writes what it needs once.

Plain PyTorch copies the states of a batch out of the pools and back, and goes over them once for
each of its functions; on a CPU that takes longer than all matrix products together. Here states are
updated where they lie. :mod:`~batchrun.model.ops.build` compiles ``native.cpp``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from batchrun.model.config import ModelConfig
from batchrun.model.layout import AttentionLayout, PrefillLayout

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MAX_SIZE = 1024
"""The largest state, and four times the largest attention head: ``SCRATCH`` of the source."""
_MIN_SHARE = 1 << 13
"""Numbers that are worth a second thread: to wake one takes some microseconds."""


def problem(config: ModelConfig) -> str | None:
    """Why these operators cannot run a model, or None."""
    if config.ssm_state_size > _MAX_SIZE or 4 * config.head_dim > _MAX_SIZE:
        return f"they hold states of {_MAX_SIZE} and attention heads of {_MAX_SIZE // 4} at most"
    return None


class NativeOps:
    """Operators compiled for this CPU. Tensors are float32 or bfloat16, rows contiguous."""

    rectangles = False

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._functions: dict[str, Any] = {}

    def conv_update(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, slots: Tensor
    ) -> Tensor:
        """One token a sequence."""
        return self._conv(x, weight, bias, state, slots, None, None)

    def causal_conv(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, layout: PrefillLayout
    ) -> Tensor:
        """Token by token; the state is the window."""
        return self._conv(x, weight, bias, state, layout.slots, layout.starts, layout.is_new)

    def _conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor,
        slots: Tensor,
        starts: Tensor | None,
        is_new: Tensor | None,
    ) -> Tensor:
        x = _rows(x)
        columns = weight.t().contiguous()  # [K, c]; a prepared model's lies like that
        out = x.new_empty(x.shape)
        self._call(
            f"conv_{_NAMES[x.dtype]}",
            (x, columns, bias, state, slots, starts, is_new, out),
            (len(slots), x.shape[1], len(columns), x.stride(0)),
            _threads(x.numel()),
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
        """Each state is read and written once."""
        return self._ssm(x, dt, B, C, A, dt_bias, skip, state, slots, None, None)

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
        """The recurrence itself: with the state in the cache it costs no more than by chunks."""
        starts, is_new = layout.starts, layout.is_new
        return self._ssm(x, dt, B, C, A, dt_bias, skip, state, layout.slots, starts, is_new)

    def _ssm(
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
        starts: Tensor | None,
        is_new: Tensor | None,
    ) -> Tensor:
        x, B, C, dt = (_rows(tensor) for tensor in (x, B, C, dt))
        if B.stride(0) != C.stride(0):
            B, C = B.contiguous(), C.contiguous()
        out = x.new_empty(x.shape)
        heads, head_size = x.shape[1:]
        self._call(
            f"ssm_{_NAMES[x.dtype]}_{_NAMES[state.dtype]}",
            (x, dt, B, C, A, dt_bias, skip, state, slots, starts, is_new, out),
            (
                len(slots),
                heads,
                head_size,
                *B.shape[1:],
                x.stride(0),
                dt.stride(0),
                B.stride(0),
            ),
            _threads(x.numel() * state.shape[-1]),
        )
        return out

    def add_norm(self, h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Sum, norm and weight, row by row."""
        assert h.is_contiguous()
        delta = None if delta is None else _rows(delta)
        out = h.new_empty(h.shape)
        stride = 0 if delta is None else delta.stride(0)
        self._call(
            f"add_norm_{_NAMES[h.dtype]}",
            (h, delta, weight, out),
            (len(h), h.shape[1], stride, ctypes.c_float(eps)),
            _threads(h.numel()),
        )
        return out

    def gated_norm(
        self, y: Tensor, z: Tensor, weight: Tensor, group_size: int, eps: float
    ) -> Tensor:
        """Gate, norm and weight, group by group."""
        y, z = y.contiguous(), _rows(z)
        out = y.new_empty(y.shape)
        self._call(
            f"gated_norm_{_NAMES[y.dtype]}",
            (y, z, weight, out),
            (len(y), y.shape[1], z.stride(0), group_size, ctypes.c_float(eps)),
            _threads(y.numel()),
        )
        return out

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: AttentionLayout,
    ) -> Tensor:
        """Reads keys and values from their blocks; softmax as they go by."""
        q = _rows(q)
        heads, head_dim = q.shape[1:]
        block_size, kv_heads = keys.shape[1:3]
        name = _NAMES[q.dtype]
        for new, pool in ((_rows(k), keys), (_rows(v), values)):
            size = kv_heads * head_dim
            rows = (new, pool, layout.write_rows)
            self._call(f"write_{name}", rows, (len(new), size, new.stride(0)), None)
        out = q.new_empty(q.shape)
        num_decodes, num_sequences = layout.num_decodes, len(layout.contexts)
        tables = layout.tables.contiguous()
        # Sequences of one token and others apart: they differ in how far they can be split.
        for first, last, longest in (
            (0, num_decodes, 1),
            (num_decodes, num_sequences, layout.longest_prefill),
        ):
            if first == last:
                continue
            places = (tables[first:], layout.contexts[first:], layout.starts[first:])
            self._call(
                f"attend_{name}",
                (q, keys, values, *places, out),
                (
                    last - first,
                    longest,
                    heads,
                    kv_heads,
                    head_dim,
                    q.stride(0),
                    tables.stride(0),
                    block_size,
                ),
                _threads((last - first) * longest * heads * head_dim * 32),
            )
        return out

    def _call(
        self,
        name: str,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int | ctypes.c_float, ...],
        threads: int | None,
    ) -> None:
        """Call a function of the source. Its tensors must live until it returns: they do."""
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._library[name]
            function.restype = None
            types: list[Any] = [ctypes.c_void_p] * len(tensors)
            types += [ctypes.c_float if type(n) is not int else ctypes.c_int64 for n in numbers]
            function.argtypes = types if threads is None else [*types, ctypes.c_int]
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if threads is None:
            function(*pointers, *numbers)
        else:
            function(*pointers, *numbers, threads)


def _rows(x: Tensor) -> Tensor:
    """The tensor with contiguous rows, the rows anywhere: copied only where it is not like that."""
    size = 1
    for length, stride in zip(x.shape[:0:-1], x.stride()[:0:-1], strict=True):
        if stride != size:
            return x.contiguous()
        size *= length
    return x


def _threads(numbers: int) -> int:
    return min(torch.get_num_threads(), 1 + numbers // _MIN_SHARE)
