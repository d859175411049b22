"""Sets of rows as ranges, compared with sets of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.rows import Rows

ordinals = st.sets(st.integers(0, 40))


@given(ordinals, ordinals)
def test_sums_and_differences_are_those_of_sets(first: set[int], second: set[int]) -> None:
    """Union, difference and what both have; and the ranges stay sorted, disjoint, apart."""
    one, other = Rows.of(first), Rows.of(second)
    for made, wanted in (
        (one, first),
        (one | other, first | second),
        (one - other, first - second),
        (one & other, first & second),
    ):
        assert list(made) == sorted(wanted)
        assert len(made) == len(wanted) and bool(made) == bool(wanted)
        assert {number for number in range(42) if number in made} == wanted
        assert made == Rows.of(wanted)
        assert all(a < b for a, b in made.ranges)
        assert all(made.ranges[i][1] < made.ranges[i + 1][0] for i in range(len(made.ranges) - 1))


@given(ordinals, st.integers(0, 50))
def test_a_split_gives_the_first_rows_and_the_others(found: set[int], count: int) -> None:
    """Together they are what was split."""
    head, rest = Rows.of(found).split(count)
    assert list(head) == sorted(found)[:count] and list(rest) == sorted(found)[count:]


@given(ordinals, st.integers(1, 10))
def test_groups_have_one_size(found: set[int], count: int) -> None:
    """All but the last, in order."""
    groups = [list(group) for group in Rows.of(found).groups(count)]
    assert [row for group in groups for row in group] == sorted(found)
    assert all(len(group) == count for group in groups[:-1])


def test_ranges_may_come_in_any_order() -> None:
    """Touching, overlapping and empty ones are made one."""
    assert Rows.of_ranges([[5, 9], [0, 3], [3, 4], [7, 12], [2, 2]]).ranges == ((0, 4), (5, 12))
    assert Rows.all(3).ranges == ((0, 3),) and Rows.all(0) == Rows()


def test_what_is_no_range_is_refused() -> None:
    """Negative ordinals, numbers that are no pairs, groups of nothing."""
    with pytest.raises(ValueError, match="-1"):
        Rows.of_ranges([[-1, 3]])
    with pytest.raises(ValueError, match="unpack"):
        Rows.of_ranges([[1, 2, 3]])
    with pytest.raises(ValueError, match="at least one row"):
        next(Rows.all(3).groups(0))


def test_rows_are_written_for_people() -> None:
    """Both ends included, single ones alone, and no text without an end."""
    assert str(Rows.of([0, 1, 2, 7])) == "0-2,7"
    assert str(Rows()) == ""
    assert str(Rows.of(range(0, 100, 2))).endswith("28,30 and 34 more ranges")
