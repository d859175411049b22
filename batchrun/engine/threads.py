"""How many threads torch uses, for as long as the engine runs and no longer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Torch uses ``count`` threads inside, and as many as before afterwards; None changes nothing.

    The number belongs to the process, where others may compute with torch between two steps.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
