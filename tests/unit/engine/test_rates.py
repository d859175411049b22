"""Which matrices are multiplied to measure a device, and how the clock of passes counts."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import nn

from batchrun.engine.cpu_load import CpuLoad, busy_seconds
from batchrun.engine.forward_clock import ForwardClock
from batchrun.engine.rates import find_device, linear_shapes, measure_rates
from batchrun.model.config import parse_config
from batchrun.model.sizes import count_weights
from tests.unit.model.models import SMALL
from tests.unit.model.published import NANO_9B_V2


def test_shapes_are_all_matrices_of_a_step() -> None:
    """For the published 9B model: 27 input projections, 25 MLPs, and as many weights as a decode
    step multiplies with."""
    config = parse_config(NANO_9B_V2)
    shapes = linear_shapes(config)
    assert shapes[22656, 4480] == 27
    assert shapes[15680, 4480] == 25
    assert shapes[131072, 4480] == 1
    counts = count_weights(config)
    total = sum(prod(shape) * number for shape, number in shapes.items())
    assert total == counts.linears + counts.head


def test_rates_of_each_batch() -> None:
    """One rate a batch size, and all of them are rates."""
    rates = measure_rates(SMALL, torch.float32, torch.device("cpu"), [1, 4], seconds=0.001)
    assert list(rates.matmul_flops) == [1, 4]
    assert min(rates.copy_bandwidth, *rates.matmul_flops.values()) > 0


def test_passes_are_counted_only_inside() -> None:
    """Calls of the model before and after the clock is entered are not its business."""
    model = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    model(x)
    with ForwardClock(model) as clock:
        model(x)
        model(x)
        assert clock.num_passes == 2
        assert clock.seconds > 0
    seconds = clock.seconds
    model(x)
    assert (clock.num_passes, clock.seconds) == (2, seconds)


def test_own_work_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three busy CPU seconds in two seconds, one was this process's: one core is foreign."""
    monkeypatch.setattr("batchrun.engine.cpu_load.busy_seconds", iter([10.0, 13.0]).__next__)
    monkeypatch.setattr("time.process_time", iter([5.0, 6.0]).__next__)
    monkeypatch.setattr("time.perf_counter", iter([100.0, 102.0]).__next__)
    assert CpuLoad().foreign_cores() == 1.0


def test_busy_seconds_leave_out_idle_and_guests(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """user 1, nice 2, system 4, idle 8, iowait 16, irq 32, softirq 64, steal 128, guests 1 + 2."""

    class Stat:
        def read_text(self) -> str:
            return "cpu  1 2 4 8 16 32 64 128 1 2\ncpu0 1 1 1 1 1 1 1 1 1 1\n"

    monkeypatch.setattr("batchrun.engine.cpu_load._STAT", Stat())
    monkeypatch.setattr("os.sysconf", lambda _name: 100)
    assert busy_seconds() == (1 + 2 + 4 + 32 + 64 + 128) / 100


def test_a_device_is_found_by_name_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's rates are measured; a GPU is one of those that are known, or none."""
    cpu = find_device(torch.device("cpu"), torch.float32)
    assert cpu is not None and min(cpu.bandwidth, cpu.flops) > 1e6
    names = iter(["NVIDIA A10G", "Something New"])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: next(names))
    known = find_device(torch.device("cuda"), torch.bfloat16)
    assert known is not None and (known.name, known.bandwidth) == ("A10G", 600e9)
    assert find_device(torch.device("cuda"), torch.bfloat16) is None
