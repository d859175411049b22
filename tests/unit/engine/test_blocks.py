"""Free lists: nothing is held twice, nothing is lost."""

from __future__ import annotations

import pytest

from batchrun.engine.blocks import Pool


def test_every_index_but_the_scratch_one_is_handed_out_once() -> None:
    """Index 0 is never anybody's."""
    pool = Pool("slot", 4)
    taken = [*pool.allocate(2), *pool.allocate(1)]
    assert sorted(taken) == [1, 2, 3]
    assert (pool.num_free, pool.num_used, pool.num_total) == (0, 3, 3)
    pool.check_integrity(taken)


def test_more_than_there_is_raises_and_takes_nothing() -> None:
    """Admission has to ask first."""
    pool = Pool("block", 3)
    with pytest.raises(RuntimeError, match="3 of block asked for, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_a_double_free_raises() -> None:
    """It would give one slot to two sequences."""
    pool = Pool("slot", 3)
    taken = pool.allocate(1)
    pool.free(taken)
    with pytest.raises(RuntimeError, match="freed but not held"):
        pool.free(taken)


def test_integrity_finds_what_does_not_agree() -> None:
    """Held by nobody, held by two, and held without being allocated."""
    pool = Pool("slot", 4)
    first, second = pool.allocate(2)
    for wrong in ([first], [first, second, 3], [first, first, second]):
        with pytest.raises(RuntimeError):
            pool.check_integrity(wrong)


def test_a_pool_may_begin_behind_another() -> None:
    """Indices of one tensor in two pools that never hand out the same."""
    first, second = Pool("slot", 4), Pool("snapshot slot", 6, 4)
    assert (first.num_total, second.num_total) == (3, 2)
    assert sorted(first.allocate(3)) == [1, 2, 3]
    held = second.allocate(2)
    assert sorted(held) == [4, 5]
    second.check_integrity(held)
    with pytest.raises(RuntimeError, match="snapshot slot 3 is freed but not held"):
        second.free([3])
