"""Random schedules of faults: no row is lost or there twice, and every rule is needed."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.protocol import RULES, Simulation, first_violation

# Their damage takes so rare a schedule that scripts/simulate.py looks for it, not every test run.
RARE = {"planrace", "memstrike"}


def test_no_schedule_breaks_a_promise() -> None:
    """Published once, whole, in order, of the planned input; ends; innocents live."""
    seen: Counter[str] = Counter()
    for seed in range(100):
        seen += Simulation(seed).run().seen
    for fault in ("killed", "zombies", "second drivers", "drains", "answers lost", "requests lost"):
        assert seen[fault] > 10, f"{fault} hardly ever happens"
    assert seen["inputs added"] and seen["inputs replaced"] and seen["own parts found"]


@pytest.mark.parametrize("rule", sorted(RULES.keys() - RARE))
def test_a_rule_that_is_taken_away_is_missed(rule: str) -> None:
    """Some schedule shows the damage: the rule carries weight, and the simulation sees it."""
    assert first_violation(range(100), rule) is not None, RULES[rule]
