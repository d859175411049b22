"""The results of a sweep as text: a table, a plot, and which budget to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchrun.scores import Estimate

if TYPE_CHECKING:
    from batchrun.cluster.curve import BudgetResult, Curve

_PLOT_WIDTH = 60


def curve_text(curve: Curve) -> str:
    """All of it."""
    blocks = [_table(curve)]
    if any(item.accuracy is not None for item in curve.results):
        blocks.append(_plot(curve.results))
    if choice := _choice(curve):
        blocks.append(choice)
    return "\n\n".join(blocks)


def _table(curve: Curve) -> str:
    """One line a budget, and what the columns mean that do not say it themselves."""
    scored = any(item.accuracy is not None for item in curve.results)
    priced = curve.price_per_worker_s is not None
    head = ["budget", "rows", "failed"]
    head += ["accuracy", "95% interval"] if scored else []
    head += ["reasoning", "completion", "hits", "alone"] + ["cost alone"] * priced
    head += ["sampled", "took"] + ["cost"] * priced
    lines = [head]
    for item in curve.results:
        counts, alone = item.summary.counts, curve.alone_seconds(item)
        line = [item.budget.name, f"{counts.rows:,}", f"{item.summary.failed_rows:,}"]
        if scored:
            line += _accuracy(item.accuracy)
        line += [
            f"{item.mean_reasoning_tokens:.1f}",
            f"{item.mean_completion_tokens:.1f}",
            f"{counts.thinking_budget_hits:,}",
            _seconds(alone),
        ]
        line += [_money(curve.cost(alone))] * priced
        line += [f"{item.spent.sampled_tokens:,}", _seconds(item.spent.seconds)]
        line += [_money(curve.cost(item.spent.seconds))] * priced
        lines.append(line)
    total = sum(item.spent.sampled_tokens for item in curve.results)
    seconds = sum(item.spent.seconds for item in curve.results)
    note = (
        "reasoning, completion: tokens of a sample. alone: about what a run at this budget alone "
        "takes, once it has\nstarted. sampled, took: what the sweep did for it; in all "
        f"{total:,} tokens in {_seconds(seconds)}"
    )
    note += f", cost {_money(curve.cost(seconds))}." if priced else "."
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join([*table, note])


def _plot(results: tuple[BudgetResult, ...]) -> str:
    """Accuracy over budget from 0 to 100%, a line a budget: the share and its 95% interval."""
    width = max(len(item.budget.name) for item in results)
    half = _PLOT_WIDTH // 2
    scale = "0%" + "50%".rjust(half - 1) + "100%".rjust(_PLOT_WIDTH - half)
    lines = [" " * (width + 2) + scale]
    for item in results:
        found = item.accuracy
        bar = [" "] * (_PLOT_WIDTH + 1)
        if found is not None:
            low, high = _column(found.low), _column(found.high)
            bar[low : high + 1] = "-" * (high - low + 1)
            bar[low], bar[high] = "[", "]"
            bar[_column(found.value)] = "o"
        lines.append(f"{item.budget.name.rjust(width)} |{''.join(bar)}|")
    return "\n".join(lines)


def _choice(curve: Curve) -> str:
    cheapest, best = curve.cheapest, curve.best
    if cheapest is None or best is None or cheapest.accuracy is None or best.accuracy is None:
        return ""
    text = (
        f"cheapest within {100 * curve.tolerance:g}% of the best: budget "
        f"{cheapest.budget.name} ({cheapest.accuracy.value:.1%} right, "
        f"{cheapest.mean_tokens:.1f} tokens a sample)"
    )
    if cheapest is not best:
        text += (
            f"\nbest: budget {best.budget.name} ({best.accuracy.value:.1%} right, "
            f"{best.mean_tokens:.1f} tokens a sample)"
        )
    return text


def _accuracy(found: Estimate | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    return [f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}"]


def _column(share: float) -> int:
    return round(share * _PLOT_WIDTH)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}s" if value < 600 else f"{value / 3600:.2f}h"


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}" if value < 10 else f"{value:,.2f}"
