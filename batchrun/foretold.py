"""A plan beside what happened: what ``batchrun plan --json`` said before a run, and the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchrun.errors import BatchrunError, InputError
from batchrun.planner.plan import FORMAT, FORMAT_VERSION
from batchrun.report import Report


@dataclass(frozen=True, slots=True)
class Foretold:
    """One figure: the range that was foretold, and what it was. ``unit`` ends its name."""

    what: str
    unit: str
    low: float
    expected: float
    high: float
    actual: float

    @property
    def is_within(self) -> bool:
        """Whether it was in the range, as far as figures are shown."""
        slack = 0.005 * max(abs(self.low), abs(self.high))
        return self.low - slack <= self.actual <= self.high + slack


def read_plan_document(path: str) -> Mapping[str, Any]:
    """What ``batchrun plan --json`` printed into a file.

    Raises InputError for anything else.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _wrong(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _wrong(path, str(error)) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _wrong(path, "it is another document")
    if document.get("version") != FORMAT_VERSION:
        raise _wrong(path, f"its version is {document.get('version')}, not {FORMAT_VERSION}")
    return document


def compare(plan: Mapping[str, Any], report: Report) -> tuple[Foretold, ...]:
    """The figures of ``plan`` for which ``report`` knows the truth.

    Raises BatchrunError when the plan lacks what its format promises.
    """
    try:
        return tuple(_figures(plan, report))
    except (KeyError, TypeError, IndexError) as error:
        raise BatchrunError(
            f"--plan: the plan has no usable {error}",
            "make it again: batchrun plan JOB.yaml --json",
        ) from error


def _figures(plan: Mapping[str, Any], report: Report) -> Iterator[Foretold]:
    counts = report.status.counts
    total = plan["prompts"]["total"]
    answered = counts.rows - counts.failed_rows
    samples = int(plan["output"]["samples_per_row"])
    if plan["done_rows"] == 0 and not report.status.rows_left:
        low, high = total["value"] - total["error"], total["value"] + total["error"]
        actual = counts.prompt_tokens / samples
        yield Foretold("prompt tokens", "", low, total["value"], high, actual)
    if answered:
        made = counts.output_tokens / (answered * samples)
        yield _range("tokens of a sample", "", plan["output"]["tokens_per_sample"], made)
    most = max((m.in_flight for h in report.histories for m in h.moments), default=0)
    workers = max((len(h.workers) for h in report.histories), default=0)
    durations = {int(item["workers"]): item for item in plan["durations"]}
    if most and workers == 1:
        expected = float(plan["sequences_in_flight"])
        yield Foretold("sequences in flight", "", 0, expected, expected, most)
    if workers in durations and len(report.histories) == 1 and not report.status.rows_left:
        duration = durations[workers]
        yield _range("seconds", "s", duration["seconds"], report.elapsed_s)
        yield _range("worker hours", "h", duration["worker_hours"], report.worker_hours)
        cost = report.cost(report.worker_hours)
        if cost is not None and duration["cost"] is not None:
            yield _range("cost", "", duration["cost"], cost)


def _range(what: str, unit: str, foretold: Mapping[str, float], actual: float) -> Foretold:
    low, expected, high = (float(foretold[name]) for name in ("low", "expected", "high"))
    return Foretold(what, unit, low, expected, high, actual)


def _wrong(path: str, why: str) -> InputError:
    return InputError(
        f"--plan: {path} is no plan ({why})", "make one before a run: batchrun plan JOB.yaml --json"
    )
