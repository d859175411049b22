"""The workloads of ``scripts/bench/compare.py``: what every engine is given."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    """A script of scripts/bench as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workloads() -> ModuleType:
    """The module that makes them."""
    return load("workloads")


def test_lengths_are_lognormal_within_limits(workloads: ModuleType) -> None:
    """Medians near 64 and 32, none beyond the limits; the same again for the same seed."""
    work = workloads.lognormal_lengths(2000, 100, 1)
    prompts, outputs = [len(ids) for ids, _ in work], [length for _, length in work]
    assert 60 < statistics.median(prompts) < 68 and 8 <= min(prompts) < max(prompts) == 256
    assert 30 < statistics.median(outputs) < 34 and 4 <= min(outputs) < max(outputs) == 192
    assert all(3 <= token < 100 for ids, _ in work for token in ids)
    assert work == workloads.lognormal_lengths(2000, 100, 1)
    assert work != workloads.lognormal_lengths(2000, 100, 2)


def test_a_prefix_is_shared_within_a_seed_alone(workloads: ModuleType) -> None:
    """256 tokens are common to all rows and no more; another seed has others."""
    work = workloads.shared_prefix(50, 1000, 1)
    [prefix] = {tuple(ids[:256]) for ids, _ in work}
    assert len({ids[256] for ids, _ in work}) > 1
    assert tuple(workloads.shared_prefix(1, 1000, 2)[0][0][:256]) != prefix


def test_the_file_is_read_as_it_was_written(workloads: ModuleType, tmp_path: Path) -> None:
    """A line a request; what an engine's process reads are the same requests."""
    file = tmp_path / "work.jsonl"
    work = workloads.lognormal_lengths(3, 100, 0)
    workloads.write(file, work)
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 3
    assert load("run_engine").read(str(file)) == work
