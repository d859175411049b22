"""The live view: one line that fits on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from batchrun.cli.progress import ProgressView, progress_line
from batchrun.cluster.tally import Progress
from batchrun.records import Counts
from batchrun.scores import Scores

WORKERS = {"starting": 12, "ready": 116, "draining": 3}
DONE = Counts(rows=123_456_789, failed_rows=54_321, scores=Scores((1, 3), 3))
BUSY = Progress(
    1_234_567_890, DONE, DONE, 9, 1, 0, WORKERS, 1.0, 1.0, tokens_per_s=123_456.0, eta_s=360_000.0
)


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


def test_a_line_gives_up_what_matters_least() -> None:
    """Without a limit all is there; the rows and the time left come before all else."""
    assert progress_line(BUSY) == (
        "123,456,789/1,234,567,890 rows (10%) · 54,321 failed · 75.0% right · 123,456 tokens/s"
        " · ETA 4 d 4 h · workers: 12 starting, 116 ready, 3 draining"
    )
    assert progress_line(BUSY, 120).endswith("ETA 4 d 4 h · 12 starting, 116 ready, 3 draining")
    assert progress_line(BUSY, 71) == (
        "123,456,789/1,234,567,890 rows (10%) · 54,321 failed · ETA 4 d 4 h"
    )
    assert progress_line(BUSY, 10) == "123,456,789/1,234,567,890 rows (10%) · ETA 4 d 4 h"
    for width in range(55, 140):
        assert len(progress_line(BUSY, width)) <= width


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_view_is_one_line_of_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much there is to say: a bar and a line that ends inside the terminal; news stand
    above it and stay."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ProgressView(quiet=False, stream=stream) as view:
        view(replace(BUSY, done=Counts(rows=100)))
        view.say("row 'a.parquet:7' failed: too_long")
        view(BUSY)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    frames = [line for line in re.split(r"[\r\n]+", text) if "rows (" in line]
    assert "(10%)" in frames[-1]
    for frame in frames:
        assert len(frame.rstrip()) <= columns and "ETA 4 d 4 h" in frame and "…" not in frame
    assert text.count("row 'a.parquet:7' failed: too_long\n") == 1


def test_a_pipe_gets_plain_lines_now_and_then() -> None:
    """No control characters; news at once, progress at most every few seconds; notes once."""
    stream = io.StringIO()
    with ProgressView(quiet=False, stream=stream) as view:
        for _ in range(3):
            view(replace(BUSY, note="waiting"))
        view.say("news")
    assert stream.getvalue() == f"waiting\n{progress_line(BUSY)}\nnews\n"


def test_quiet_is_quiet() -> None:
    """On a terminal too."""
    for stream in (Terminal(), io.StringIO()):
        with ProgressView(quiet=True, stream=stream) as view:
            view(replace(BUSY, note="waiting"))
            view.say("news")
        assert stream.getvalue() == ""
