"""``batchrun sweep``: one job over several thinking budgets.

Each budget is an ordinary run with an output of its own. The largest goes first and keeps the
tokens that it sampled; every other run takes over as many of them as its budget leaves, which are
the very tokens that it would sample itself, and generates the rest: mostly the answer alone. Rows
that finished within a smaller budget are not run at all.

With fixed batch shapes (``deterministic``) nothing is taken over: a token that is read back is
prefilled and rounds otherwise than one that was decoded.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from batchrun.cluster.budgets import Budget
from batchrun.cluster.connection import Cluster
from batchrun.cluster.curve import BudgetResult, Curve, Spent, read_spent
from batchrun.cluster.driver import run_checked
from batchrun.cluster.opening import CheckedJob, check
from batchrun.cluster.summary import Summary
from batchrun.cluster.view import NoView, View
from batchrun.cluster.worker import TraceSource
from batchrun.coordinator import OutcomeKind
from batchrun.data.jobrecord import find_run
from batchrun.data.store import Store
from batchrun.errors import JobError, OutputError, Problem
from batchrun.job import Job
from batchrun.jobfile import JobSource

SWEEP_NAME = "sweep.json"
"""What a sweep found, in its output."""

_BOUND_KEYS = ("reasoning", "max_thinking_tokens")


def run_sweep(
    job: Job,
    budgets: Sequence[Budget],
    *,
    tolerance: float = 0.01,
    source: JobSource | None = None,
    address: str | None = None,
    deterministic: bool = False,
    stop: threading.Event | None = None,
    view: View | None = None,
) -> Curve:
    """Run ``job`` at every budget, or until ``stop`` is set; what is finished is not run again.

    Raises:
        BatchrunError: what keeps a run from beginning or going on, see :func:`run_job`. Nothing
            is written when the job cannot be run at one of the budgets.
    """
    view, stop = view or NoView(), stop or threading.Event()
    _refuse_overrides(job, source)
    base = max(budgets, key=lambda budget: budget.rank)
    order = [base, *(budget for budget in reversed(budgets) if budget != base)]
    checked = _check_all(job, order, source, keeps_traces=base.thinks and not deterministic)
    sweep = _Sweep(job, base, tuple(budgets), tolerance)
    traces = None
    if checked[base].keeps_traces:
        output = checked[base].job.output
        traces = TraceSource(checked[base].run, output.path, output.storage_options)
    with Cluster(job, address, view, keeps_workers=True) as cluster:
        for number, budget in enumerate(order, start=1):
            if stop.is_set():
                break
            view.say(f"thinking budget {budget.name} ({number} of {len(order)})")
            summary = run_checked(
                checked[budget],
                cluster,
                started=time.monotonic(),
                deterministic=deterministic,
                stop=stop,
                view=view,
                source=traces if budget.thinks and budget != base else None,
            )
            sweep.add(budget, summary)
            if summary.outcome in (OutcomeKind.INTERRUPTED, OutcomeKind.NO_WORKERS):
                break
    return sweep.curve()


class _Sweep:
    """The results as they come; after each the document in the output is replaced."""

    def __init__(
        self, job: Job, base: Budget, budgets: tuple[Budget, ...], tolerance: float
    ) -> None:
        self._job = job
        self._base = base
        self._budgets = budgets
        self._tolerance = tolerance
        self._store = Store.open(job.output.path, job.output.storage_options)
        self._before = self._read_spent()
        self._results: dict[Budget, BudgetResult] = {}

    def add(self, budget: Budget, summary: Summary) -> None:
        """Take the end of a run."""
        spent = self._before.get((budget.name, summary.run_id), Spent())
        if summary.generated_rows or summary.sampled_tokens:
            working = summary.elapsed_s - summary.startup_s
            spent += Spent(summary.elapsed_s, working, summary.sampled_tokens)
        samples = self._job.generation.n
        self._results[budget] = BudgetResult(budget, summary, samples, spent)
        document = json.dumps(self.curve().to_json(), indent=1)
        self._store.put(SWEEP_NAME, document.encode())

    def curve(self) -> Curve:
        """All that is known so far."""
        resources = self._job.resources
        price = resources.price_per_gpu_hour
        results = tuple(self._results[b] for b in self._budgets if b in self._results)
        return Curve(
            name=self._job.name,
            output=self._job.output.path,
            tolerance=self._tolerance,
            results=results,
            base=self._base,
            num_workers=resources.most_workers,
            price_per_worker_s=None if price is None else price / 3600,
            is_complete=len(results) == len(self._budgets)
            and all(item.is_finished for item in results),
        )

    def _read_spent(self) -> Mapping[tuple[str, str], Spent]:
        data = self._store.read(SWEEP_NAME)
        try:
            return read_spent(json.loads(data or b"null"))
        except ValueError:
            return {}


def _check_all(
    job: Job, order: Sequence[Budget], source: JobSource | None, *, keeps_traces: bool
) -> dict[Budget, CheckedJob]:
    """The job at every budget, checked before any of them runs; the first keeps its tokens."""
    first = check(order[0].job(job), source)
    store = Store.open(job.output.path, job.output.storage_options)
    if find_run(store) is not None:
        raise OutputError(
            f"output: {store.url} is the output of a run, and a sweep makes folders in its own",
            "choose another output, or run `batchrun discard OUTPUT` first",
        )
    others = {budget: first.variant(budget.job(job)) for budget in order[1:]}
    return {order[0]: replace(first, keeps_traces=keeps_traces), **others}


def _refuse_overrides(job: Job, source: JobSource | None) -> None:
    """A column that sets the budget of its row would win over each budget of the sweep."""
    key = "input.overrides"
    place = job.name if source is None else source.place(key)
    problems = tuple(
        Problem(
            place,
            key,
            f"a sweep sets {name} for all rows, so no column can",
            f"take {name} out of the list, e.g. with --set {key}=[]",
        )
        for name in _BOUND_KEYS
        if name in job.input.overrides
    )
    if problems:
        raise JobError(problems)
