"""A report as one HTML page that needs no network: style, charts and texts are all inside."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batchrun import __version__
from batchrun.charts import Series, bar_chart, line_chart, share_bar
from batchrun.data.facts import Distribution
from batchrun.data.history import History
from batchrun.foretold import Foretold
from batchrun.records import HEALING
from batchrun.report import STATES, Report
from batchrun.wording import duration

_MAX_LINES = 8  # workers in one chart: more cannot be told apart
_SMOOTH = 60  # points of a rate's line
_NAMES = {
    "prompt_tokens": "prompt",
    "reasoning_tokens": "reasoning",
    "completion_tokens": "completion",
}
_MEANINGS = {
    "provision": "waiting for the cluster",
    "load": "loading the model",
    "compile": "compiling and warming up",
    "generate": "generating",
    "starved": "without rows to run",
    "drain": "saving before the end",
}


def report_page(report: Report, foretold: Sequence[Foretold] = ()) -> str:
    """The page; ``foretold`` is what a plan said before the run."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "figure": _figure,
        "duration": duration,
        "money": _money,
    }
    kind, sentence = report.verdict
    seconds = {state: spent for state, spent in report.seconds.items() if spent > 0}
    whole = sum(seconds.values()) or 1.0
    return environment.get_template("report.html").render(
        report=report,
        status=report.status,
        counts=report.status.counts,
        facts=report.facts,
        foretold=foretold,
        verdict=kind,
        sentence=sentence,
        throughput=_charts(_throughput, report),
        in_flight=_charts(_in_flight, report),
        worker_charts=_charts(_worker_rates, report),
        time_bar=Markup(share_bar("what the workers' time went into", list(seconds.items()))),
        time_rows=[
            (number, state, _MEANINGS[state], spent, spent / whole, report.cost(spent / 3600))
            for number, (state, spent) in enumerate(seconds.items())
            if state in STATES
        ],
        histograms=[
            (_NAMES[name], spread, Markup(_histogram(name, spread, number)))
            for number, (name, spread) in enumerate(report.facts.tokens.items())
        ],
        curable=[kind for kind in report.facts.errors if kind in HEALING],
        many_workers=any(len(history.workers) > _MAX_LINES for history in report.histories),
        job=json.dumps(report.job, indent=2, ensure_ascii=False),
        made_at=_when(datetime.now(UTC).timestamp()),
        version=__version__,
        when=_when,
    )


def _charts(draw: Callable[[History], str], report: Report) -> list[tuple[str, Markup]]:
    """The same chart for each submit that has something to show."""
    return [
        (f"submit {history.epoch}, {_when(history.started_at)}", Markup(draw(history)))
        for history in report.histories
        if len(history.moments) > 1
    ]


def _throughput(history: History) -> str:
    points = [(moment.at, float(moment.sampled_tokens)) for moment in history.moments]
    line = Series("tokens a second", _rate(points))
    return line_chart("tokens a second over time", [line], unit="tokens/s")


def _in_flight(history: History) -> str:
    line = Series("sequences in flight", tuple((m.at, m.in_flight) for m in history.moments))
    return line_chart("sequences in flight over time", [line], unit="sequences")


def _worker_rates(history: History) -> str:
    workers = [(name, worker) for name, worker in history.workers.items() if worker.moments]
    lines = [
        Series(f"{name} on {worker.host}", _rate([(m.at, float(m.tokens)) for m in worker.moments]))
        for name, worker in sorted(workers, key=lambda pair: pair[1].tokens)[:_MAX_LINES]
    ]
    return line_chart("tokens a second of each worker", lines, unit="tokens/s")


def _rate(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Growth a second between points that are far enough from one another to be smooth."""
    step = max(1, len(points) // _SMOOTH)
    kept = [*points[:-1:step], points[-1]]
    return tuple(
        ((a[0] + b[0]) / 2, max(0.0, (b[1] - a[1]) / (b[0] - a[0])))
        for a, b in itertools.pairwise(kept)
        if b[0] > a[0]
    )


def _histogram(name: str, spread: Distribution, colour: int) -> str:
    bars = [("0" if not i else f"{2 ** (i - 1)}", float(n)) for i, n in enumerate(spread.counts)]
    return bar_chart(f"{_NAMES[name]} tokens of a sample", bars, unit="samples", colour=colour)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _figure(value: float) -> str:
    """As many digits as a person reads."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _money(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"
