"""How messages word things."""

from __future__ import annotations

import pytest

from batchrun.wording import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (2.46, "2.5 s"),
        (41.4, "41 s"),
        (59.6, "1 min 0 s"),
        (725.0, "12 min 5 s"),
        (12_000.0, "3 h 20 min"),
        (187_200.0, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    """Two units at most, the same wherever a person reads one."""
    assert duration(seconds) == text
