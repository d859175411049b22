"""A small fleet on a virtual clock; scripts/simulate.py runs the big one."""

from __future__ import annotations

from batchrun.coordinator import OutcomeKind
from tests.simulation.fleet import Fleet, FleetPlan


def test_a_fleet_that_loses_workers_wastes_little() -> None:
    """Every shard once, only deadly rows given up, little done twice, no long tail."""
    result = Fleet(FleetPlan(600, 30, losses_per_hour=0.5, seed=1)).run()
    assert result.outcome.kind is OutcomeKind.SUCCESS
    assert result.published == frozenset(range(600))
    assert result.lost_rows == result.poison and len(result.poison) == 3
    assert result.num_losses > 9 and result.num_isolated > 9
    assert result.waste < 0.01
    assert result.overhead < 0.15


def test_one_big_shard_keeps_a_fleet_busy() -> None:
    """It is split; all end nearly together."""
    plan = FleetPlan(1, 20, rows_per_shard=40_000, losses_per_hour=0.001, num_poison=0)
    result = Fleet(plan).run()
    assert result.outcome.counts.rows == 40_000
    assert result.num_leases > 40
    assert result.overhead < 0.15
