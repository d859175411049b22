"""Drive the real coordinator through simulated fleets and simulated disasters.

    python scripts/simulate.py fleet       100,000 shards, 1,000 workers, 5 % of them lost an hour
    python scripts/simulate.py protocol    random schedules with faults of every kind
    python scripts/simulate.py retries     the same around retries of a finished run
    python scripts/simulate.py mutants     the same with each rule taken away in turn
    python scripts/simulate.py             all of it

Ends with 1 when a figure is worse than what the project promises, when a schedule breaks a promise
or when taking a rule away goes unnoticed.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.simulation.fleet import Fleet, FleetPlan
from tests.simulation.protocol import RULES, Simulation, Violation, first_violation
from tests.simulation.retries import RETRY_RULES, RetrySimulation


def fleet(num_shards: int, num_workers: int, seed: int) -> bool:
    """Print what a run of this size takes; whether that is within the promises."""
    began = time.monotonic()
    result = Fleet(FleetPlan(num_shards, num_workers, seed=seed)).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"fleet: {num_shards:,} shards, {num_workers:,} workers, {result.total_rows:,} rows, "
        f"{result.num_losses} workers lost, {result.num_leases:,} leases "
        f"({result.num_isolated} to isolate suspects), seed {seed}\n"
        f"  outcome      {result.outcome.kind}, {len(result.lost_rows)} rows given up "
        f"of {len(result.poison)} deadly ones\n"
        f"  events       {result.num_events:,}, {result.events_per_s:,.0f} a second on one core\n"
        f"  peak memory  {peak:,.0f} MB, the simulation's own included\n"
        f"  makespan     {result.makespan_s:,.0f} s, ideal {result.ideal_s:,.0f} s: "
        f"{100 * result.overhead:+.2f} %\n"
        f"  waste        {100 * result.waste:.3f} % of the rows were done again\n"
        f"  real time    {time.monotonic() - began:.0f} s"
    )
    return (
        result.lost_rows == result.poison
        and len(result.published) == num_shards
        and result.events_per_s >= 20_000
        and peak < 1024
        and result.overhead < 0.03
        and result.waste < 0.01
    )


def protocol(seeds: range, name: str, kind: type[Simulation]) -> bool:
    """Print what happened in so many schedules of a kind; whether all promises held."""
    began = time.monotonic()
    seen: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    first: dict[str, int] = {}
    tokens = again = 0
    for seed in seeds:
        simulation = kind(seed)
        try:
            simulation.run()
        except Violation as violation:
            broken[str(violation)] += 1
            first.setdefault(str(violation), seed)
        seen += simulation.seen
        tokens += simulation.tokens
        again += simulation.tokens_again
    print(
        f"{name}: {len(seeds):,} schedules, {sum(broken.values())} of them broken, "
        f"{time.monotonic() - began:.0f} s\n"
        f"  faults       {', '.join(f'{what} {count:,}' for what, count in seen.most_common())}\n"
        f"  tokens       {tokens:,}, {100 * again / max(1, tokens):.1f} % sampled again"
    )
    for what, count in broken.items():
        print(f"  BROKEN       {what}: {count} times, first with seed {first[what]}")
    return not broken


def mutants(seeds: range) -> bool:
    """Print how soon the absence of each rule shows; whether it does for all."""
    good = True
    kinds = [(rule, Simulation) for rule in RULES] + [(r, RetrySimulation) for r in RETRY_RULES]
    for rule, kind in kinds:
        meaning = (RULES if kind is Simulation else RETRY_RULES)[rule]
        found = first_violation(seeds, rule, kind)
        good &= found is not None
        what = "UNNOTICED" if found is None else f"seed {found[0]}: {found[1]}"
        print(f"without {rule + ':':13s} ({meaning}) {what}")
    return good


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="all", choices=["all", "fleet", "protocol", "retries", "mutants"]
    )
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=int, default=2_000, help="schedules of each kind")
    arguments = parser.parse_args()
    good = True
    if arguments.what in ("all", "fleet"):
        good &= fleet(arguments.shards, arguments.workers, arguments.seed)
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    if arguments.what in ("all", "protocol"):
        good &= protocol(seeds, "protocol", Simulation)
    if arguments.what in ("all", "retries"):
        good &= protocol(seeds, "retries", RetrySimulation)
    if arguments.what in ("all", "mutants"):
        good &= mutants(seeds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
