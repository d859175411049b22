"""An engine's threads are its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from batchrun.engine.threads import torch_threads
from tests.unit.engine.support import make_engine, run_one


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Torch has two threads, and what it had before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "inside"), [(None, 2), (2, 2), (1, 1), (3, 3)])
def test_only_inside(count: int | None, inside: int) -> None:
    """The number holds inside, and an error does not make it stay."""
    with pytest.raises(ZeroDivisionError), torch_threads(count):
        assert torch.get_num_threads() == inside
        raise ZeroDivisionError
    assert torch.get_num_threads() == 2


def test_a_small_model_steps_on_one_thread(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it steps; the process around it keeps its own."""
    engine = make_engine(random_folder)
    seen = []
    launch = engine.runner.launch
    monkeypatch.setattr(
        engine.runner,
        "launch",
        lambda step: (seen.append(torch.get_num_threads()), launch(step))[1],
    )
    run_one(engine, [30, 31], max_tokens=2, ignore_eos=True)
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2
