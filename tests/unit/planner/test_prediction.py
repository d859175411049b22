"""The arithmetic from prompts, outputs and a device to hours."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchrun.engine.accelerators import find_accelerator
from batchrun.model.config import parse_config
from batchrun.model.sizes import Precision
from batchrun.planner.outputs import Range
from batchrun.planner.prediction import Machine, Prediction, Workload, predict, worker_counts
from tests.unit.model.published import NANO_9B_V2

CONFIG = parse_config(NANO_9B_V2)
A10 = find_accelerator("A10G")
SURE = Range(1.0, 1.0, 1.0)
MACHINE = Machine(8, A10, A10, SURE, SURE, Range(0.0, 0.0, 0.0))
WORK = Workload(
    rows=800,
    samples=1,
    mean_prompt=8192,
    prompt_lengths=(8192,),
    prefix_tokens=0,
    output=Range(16384, 16384, 16384),
    longest=16384,
    shards=100,
)


def predicted(
    machine: Machine = MACHINE, work: Workload = WORK, workers: tuple[int, ...] = (1,)
) -> Prediction:
    """The prediction for the 9B model in bfloat16."""
    return predict(CONFIG, Precision(), machine, work, workers)


def test_the_published_case() -> None:
    """8k in, 16k out on an A10, 8 at once: 35 ms a step, 228 tokens/s, 225 with prefill."""
    found = predicted()
    assert found.step_seconds == pytest.approx(0.0351, rel=0.01)
    assert found.decode.bound == pytest.approx(228, rel=0.01)
    assert found.decode.bound_by == "bandwidth"
    tokens = 800 * 16384
    assert tokens / found.durations[0].seconds.expected == pytest.approx(225, rel=0.01)


def test_shares_of_the_bound() -> None:
    """The low time is that of few tokens on a fast engine, the high one of many on a slow one."""
    slow = replace(MACHINE, decode_share=Range(0.5, 0.8, 1.0), prefill_share=Range(0.5, 0.8, 1.0))
    sure, found = predicted().durations[0].seconds, predicted(slow).durations[0].seconds
    assert found.low == pytest.approx(sure.low)
    assert found.expected == pytest.approx(sure.expected / 0.8)
    assert found.high == pytest.approx(2 * sure.high)


def test_workers_and_shards() -> None:
    """Twice the workers take half the time for the same hours, as long as there are shards."""
    one, two, many = predicted(workers=(1, 2, 400)).durations
    assert two.seconds.expected == pytest.approx(one.seconds.expected / 2)
    assert two.worker_hours.expected == pytest.approx(one.worker_hours.expected)
    assert many.busy == 100
    assert many.worker_hours.expected > 3 * one.worker_hours.expected
    [shared] = predicted(work=replace(WORK, shards=1), workers=(400,)).durations
    assert shared.busy == 50  # one big shard, leased 16 rows at a time
    assert worker_counts(6) == (1, 2, 4, 6)
    assert worker_counts(1) == (1,)


def test_the_longest_row_bounds_a_run() -> None:
    """A run with fewer rows than slots takes as long as its longest row."""
    few = replace(WORK, rows=4, output=Range(100, 100, 100), longest=16384)
    found = predicted(work=few).durations[0].seconds
    assert found.expected == pytest.approx(found.low, rel=1.0)
    assert found.high > 16384 * 0.027


def test_samples_share_a_prompt() -> None:
    """Eight samples of a row decode eight times as much and read its prompt once; what all prompts
    share is read once in all."""
    one, eight = predicted(), predicted(work=replace(WORK, samples=8))
    assert eight.prompt_tokens == one.prompt_tokens == 800 * 8192
    ratio = eight.durations[0].seconds.expected / one.durations[0].seconds.expected
    assert 7.8 < ratio < 8
    shared = predicted(work=replace(WORK, prefix_tokens=8000))
    assert shared.prompt_tokens == 800 * 192 + 8000
    assert shared.durations[0].seconds.expected < one.durations[0].seconds.expected


def test_nothing_left() -> None:
    """Where no row is left there is nothing to start for."""
    started = replace(MACHINE, startup=Range(1.0, 2.0, 3.0))
    [none] = predicted(started, replace(WORK, rows=0)).durations
    assert (none.busy, none.seconds.high) == (0, 0)
    [some] = predicted(started).durations
    assert some.seconds.low == pytest.approx(predicted().durations[0].seconds.low + 1)


def test_workers_share_cpus() -> None:
    """Workers on one machine are no faster together than its CPUs."""
    two, four = predict(CONFIG, Precision(), MACHINE, WORK, (2, 4), num_cpus=2).durations
    assert four.seconds.expected == pytest.approx(two.seconds.expected)
