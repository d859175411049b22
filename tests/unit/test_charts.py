"""The charts of the report."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from batchrun.charts import Series, bar_chart, line_chart, share_bar


def numbers(text: str) -> list[float]:
    """All numbers in an attribute."""
    return [float(found) for found in re.findall(r"-?\d+(?:\.\d+)?", text)]


@pytest.mark.parametrize("most", [0.0, 0.3, 1.0, 7.0, 999.0, 123_456.0, 8e9])
@pytest.mark.parametrize("seconds", [0.0, 4.0, 200.0, 90_000.0])
def test_lines_stay_inside_the_plot(most: float, seconds: float) -> None:
    """Whatever the values, every point is inside, the highest is near the top, and the axis is
    labelled in a unit that fits."""
    points = tuple((seconds * i / 10, most * i / 10) for i in range(11))
    svg = ET.fromstring(line_chart("rates", [Series("a", points)], unit="tokens/s"))
    _, _, width, height = numbers(svg.attrib["viewBox"])
    (line,) = svg.iter("polyline")
    places = numbers(line.attrib["points"])
    assert all(0 <= x <= width for x in places[::2])
    assert all(0 <= y <= height for y in places[1::2])
    if most:
        assert min(places[1::2]) < height * 0.65
    units = {item.text for item in svg.iter("text")} & {"s", "min", "h"}
    assert {"s" if seconds < 180 else "min" if seconds < 3 * 3600 else "h"} == units


def test_bars_are_as_tall_as_their_values() -> None:
    """Heights are in proportion, and each bar says its number."""
    svg = ET.fromstring(bar_chart("sizes", [("1", 10.0), ("2", 40.0), ("4", 0.0)], unit="rows"))
    heights = [float(item.attrib["height"]) for item in svg.iter("rect")]
    assert 4.0 == pytest.approx(heights[1] / heights[0], rel=0.01) and 0.0 == heights[2]
    assert ["1: 10 rows", "2: 40 rows", "4: 0 rows"] == [
        title.text for rect in svg.iter("rect") for title in rect.iter("title")
    ]


def test_a_share_bar_is_divided_whole() -> None:
    """The parts fill the bar in their proportion, also when there is nothing to divide."""
    svg = ET.fromstring(share_bar("time", [("load", 1.0), ("generate", 3.0)]))
    widths = [float(item.attrib["width"]) for item in svg.iter("rect")]
    assert [180.0, 540.0] == widths
    assert 0.0 == sum(
        float(item.attrib["width"])
        for item in ET.fromstring(share_bar("time", [("load", 0.0)])).iter("rect")
    )


def test_names_are_only_text() -> None:
    """A name with markup in it stays a name."""
    name = '<script>alert("x")</script>'
    for chart in (
        line_chart(name, [Series(name, ((0.0, 1.0),))], unit=name),
        bar_chart(name, [(name, 1.0)], unit=name),
        share_bar(name, [(name, 1.0)]),
    ):
        svg = ET.fromstring(chart)
        assert not list(svg.iter("script"))
        assert name == svg.attrib["aria-label"]
