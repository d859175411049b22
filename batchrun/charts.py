"""Small charts as SVG, to stand inside a page whose style sheet gives their colours. Pure.

Classes that a page styles: ``axis``, ``grid``, ``label``, and ``s0`` to ``s7`` for the series.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26  # around the plot, in the chart's units
_NUM_COLOURS = 8


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its name, and its points from left to right."""

    name: str
    points: tuple[tuple[float, float], ...]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    width: int = 480,
    height: int = 190,
    markers: Sequence[float] = (),
) -> str:
    """Lines over hours, minutes or seconds, whichever fits. ``markers`` are vertical lines."""
    points = [point for item in series for point in item.points]
    most_x = max((x for x, _ in points), default=0.0) or 1.0
    most_y = _nice(max((y for _, y in points), default=0.0) or 1.0)
    inner_w, inner_h = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def x_of(value: float) -> float:
        return _LEFT + inner_w * value / most_x

    def y_of(value: float) -> float:
        return _TOP + inner_h * (1 - value / most_y)

    parts = list(_frame(width, height, most_y, unit))
    scale, word = _time_scale(most_x)
    step = _nice(most_x / scale / 6)
    tick = 0.0
    while tick * scale <= most_x * 1.001:
        parts.append(_text(x_of(tick * scale), height - 8, f"{tick:g}", "middle"))
        tick = round(tick + step, 10)
    parts.append(_text(width - _RIGHT, height - 8, word, "end"))
    for at in markers:
        place = f"{x_of(min(at, most_x)):.1f}"
        parts.append(
            f'<line class="marker" x1="{place}" x2="{place}" y1="{_TOP}" y2="{_TOP + inner_h}"/>'
        )
    for number, item in enumerate(series):
        places = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in item.points)
        parts.append(
            f'<polyline class="line s{number % _NUM_COLOURS}" points="{places}">'
            f"<title>{escape(item.name)}</title></polyline>"
        )
    return _svg(title, width, height, parts)


def bar_chart(
    title: str,
    bars: Sequence[tuple[str, float]],
    *,
    unit: str,
    colour: int = 0,
    width: int = 340,
    height: int = 180,
) -> str:
    """One bar a label, from left to right."""
    most = _nice(max((value for _, value in bars), default=0.0) or 1.0)
    inner_w, inner_h = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    parts = list(_frame(width, height, most, unit))
    slot = inner_w / max(1, len(bars))
    every = max(1, math.ceil(len(bars) * 42 / inner_w))
    for number, (label, value) in enumerate(bars):
        x = _LEFT + number * slot
        tall = inner_h * value / most
        parts.append(
            f'<rect class="s{colour % _NUM_COLOURS}" x="{x + slot * 0.1:.1f}" '
            f'y="{_TOP + inner_h - tall:.1f}" width="{slot * 0.8:.1f}" height="{tall:.1f}">'
            f"<title>{escape(label)}: {value:,.0f} {escape(unit)}</title></rect>"
        )
        if number % every == 0:
            parts.append(_text(x + slot / 2, height - 8, label, "middle"))
    return _svg(title, width, height, parts)


def share_bar(title: str, shares: Sequence[tuple[str, float]], *, width: int = 720) -> str:
    """One bar that is divided among its parts, in proportion."""
    total = sum(value for _, value in shares) or 1.0
    height, x = 34, 0.0
    parts = []
    for number, (label, value) in enumerate(shares):
        wide = width * value / total
        parts.append(
            f'<rect class="s{number % _NUM_COLOURS}" x="{x:.1f}" y="2" width="{wide:.1f}" '
            f'height="{height - 4}"><title>{escape(label)}: {value / total:.1%}</title></rect>'
        )
        x += wide
    return _svg(title, width, height, parts)


def _frame(width: int, height: int, most: float, unit: str) -> Iterator[str]:
    """Horizontal lines with their values, and what they count."""
    inner_h = height - _TOP - _BOTTOM
    for part in range(5):
        y = _TOP + inner_h * (1 - part / 4)
        kind = "grid" if part else "axis"
        yield f'<line class="{kind}" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(_LEFT - 6, y + 4, _short(most * part / 4), "end")
    yield _text(_LEFT + 4, _TOP + 10, unit, "start")


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _nice(value: float) -> float:
    """The next number of the form 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (1, 2, 2.5, 5, 10):
        if factor * power >= value * 0.999999:
            return factor * power
    return 10 * power


def _time_scale(seconds: float) -> tuple[float, str]:
    if seconds >= 3 * 3600:
        return 3600.0, "h"
    if seconds >= 180:
        return 60.0, "min"
    return 1.0, "s"


def _short(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:g}"
