"""How long the model's forward passes take, so that the rest of a step can be told from them."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from torch import nn


class ForwardClock:
    """Times every call of a model while it is entered (``with ForwardClock(model) as clock``).

    On a GPU the time is the device's, between the first and the last kernel of a call; passes that
    are replayed as a CUDA graph are no calls and are not seen, so ask :attr:`num_passes`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._is_cuda = next(model.parameters()).is_cuda
        self._started = 0.0
        self._begin: torch.cuda.Event | None = None
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0
        self.num_passes = 0
        """Calls that were timed."""

    def __enter__(self) -> ForwardClock:
        self._hooks = (
            self._model.register_forward_pre_hook(self._before),
            self._model.register_forward_hook(self._after),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def seconds(self) -> float:
        """The sum of all calls; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return self._seconds

    def _before(self, _model: nn.Module, _args: object) -> None:
        if not self._is_cuda:
            self._started = time.perf_counter()
        elif not torch.cuda.is_current_stream_capturing():
            self._begin = _mark()

    def _after(self, _model: nn.Module, _args: object, _out: object) -> None:
        if not self._is_cuda:
            self._seconds += time.perf_counter() - self._started
        elif self._begin is not None:
            self._events.append((self._begin, _mark()))
            self._begin = None
        else:
            return
        self.num_passes += 1


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
