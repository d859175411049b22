from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from batchrun.model.ops.mamba_kernels import find_obstacle
from tests.unit.model.ops.interpreter import InterpretedOps, prepare


@pytest.fixture(scope="session")
def fast() -> Iterator[InterpretedOps]:
    """The Triton operators under the interpreter."""
    obstacle = find_obstacle()
    if obstacle is not None:
        pytest.skip(f"{obstacle.reason}: {obstacle.hint}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare) as process:
        yield InterpretedOps(process)
