"""Random schedules of faults around retries: parts take the place of parts, and nothing is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.protocol import first_violation
from tests.simulation.retries import RETRY_RULES, RetrySimulation

# Their damage takes so rare a schedule that scripts/simulate.py looks for it, not every test run.
RARE = {"eager", "latestage", "norecover", "recorded"}


def test_no_schedule_breaks_a_promise() -> None:
    """A retry cut off anywhere and gone on with tries every row, none twice that was journaled;
    nothing but those rows changes; files that come later have their rows once."""
    seen: Counter[str] = Counter()
    for seed in range(60):
        seen += RetrySimulation(seed).run().seen
    for event in ("retries resumed", "parts replaced", "retries recovered", "locks lost"):
        assert seen[event] > 10, f"{event}: hardly ever"
    assert seen["inputs added"] > 10


@pytest.mark.parametrize("rule", sorted(RETRY_RULES.keys() - RARE))
def test_a_rule_that_is_taken_away_is_missed(rule: str) -> None:
    """Some schedule shows the damage: the rule carries weight, and the simulation sees it."""
    assert first_violation(range(60), rule, RetrySimulation) is not None, RETRY_RULES[rule]
