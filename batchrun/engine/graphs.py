"""Steps that only decode, recorded once for some batch sizes and replayed.

A decode step of a large model is hundreds of small kernels, and launching them takes longer than
running them. A CUDA graph launches all of them at once, but always with the same shapes and
addresses. So a step is rounded up to the next recorded size; its inputs are copied to where the
recording reads them, and rows that are too many are padding, which lives in scratch slot 0 and
scratch block 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from batchrun.model.batch import DecodeBatch
from batchrun.model.hybrid import NemotronH
from batchrun.model.state import State
from batchrun.model.transfer import stage

IN_FLIGHT = -1
"""As a token: the one that the row's slot was sampled last, which only the device knows yet."""
_PADDING = (0, 0, 1)
"""Token, slot and context of a row that nobody reads."""


class Recorder(Protocol):
    """Records work on a device: what is run once to be run again."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run ``run`` and give what repeats it, reading and writing the same memory."""


class CudaRecorder:
    """CUDA graphs that share one memory pool: they are never replayed at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture ``run``; before that it is run as it is, as compiling cannot be captured."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run()
        return graph.replay


class DecodeGraphs:
    """Decode steps of up to ``most`` sequences over ``state``, recorded when this is made.

    ``tables`` [slots, n] int64 are the block tables by slot, that of slot 0 all zeros;
    ``last_tokens`` [slots] int64 are the tokens that were sampled last. Both are read at every
    replay, where they are.
    """

    def __init__(
        self,
        model: NemotronH,
        state: State,
        tables: Tensor,
        last_tokens: Tensor,
        *,
        most: int,
        recorder: Recorder,
    ) -> None:
        device = tables.device
        self._model = model
        self._state = state
        self._tables = tables
        self._last_tokens = last_tokens
        # The step before may still run when these are filled for the next one, and its logits may
        # be read later than that: the device does what it is given in order.
        self._inputs = torch.empty(len(_PADDING), most, dtype=torch.int64, device=device)
        # One for all sizes, outside of the graphs' pool: they would keep one each.
        self._logits = torch.empty(most, model.config.vocab_size, device=device)
        self._sizes = bucket_sizes(most)
        self._replays: dict[int, Callable[[], None]] = {}
        # The largest first: the smaller ones find room in the memory that it took.
        for size in reversed(self._sizes):
            self._put([], [], [], size)
            self._replays[size] = recorder.record(partial(self._forward, size))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes that are recorded, ascending."""
        return self._sizes

    def run(self, token_ids: list[int], slots: list[int], context_lens: list[int]) -> Tensor:
        """Float32 logits [D, vocab] of a step, as :meth:`NemotronH.forward` gives them for decodes;
        they are overwritten by the next one. A token may be :data:`IN_FLIGHT`."""
        num_decodes = len(token_ids)
        size = self._sizes[bisect_left(self._sizes, num_decodes)]
        self._put(token_ids, slots, context_lens, size)
        self._replays[size]()
        return self._logits[:num_decodes]

    def _put(
        self, token_ids: list[int], slots: list[int], context_lens: list[int], size: int
    ) -> None:
        """Copy the rows, padded to ``size``, to the device, from memory that no other copy uses."""
        kinds = zip((token_ids, slots, context_lens), _PADDING, strict=True)
        rows = [values + [padding] * (size - len(values)) for values, padding in kinds]
        self._inputs[:, :size].copy_(stage(rows, self._inputs.device), non_blocking=True)

    def _forward(self, size: int) -> None:
        token_ids, slots, context_lens = self._inputs[:, :size]
        last = self._last_tokens.index_select(0, slots)
        torch.where(token_ids == IN_FLIGHT, last, token_ids, out=token_ids)
        batch = DecodeBatch(token_ids, slots, context_lens, self._tables.index_select(0, slots))
        self._logits[:size].copy_(self._model(batch, self._state))


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Batch sizes worth recording: powers of two up to 8, then every eighth, and ``most``."""
    small = (size for size in (1, 2, 4) if size < most)
    return (*small, *range(8, most, 8), most)
