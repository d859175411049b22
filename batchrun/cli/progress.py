"""The live view of a run: a bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from batchrun.wording import duration

if TYPE_CHECKING:
    from rich.progress import BarColumn, TaskID
    from rich.progress import Progress as Bar

    from batchrun.cluster.tally import Progress

_LINE_EVERY_S = 10.0
_SPINNER_WIDTH = 2
_BAR_WIDTHS = (24, 16, 8)  # a bar that changed with every digit of the line would jump


class ProgressView:
    """Shows a run's progress on stderr while the ``with`` lasts. Call it with each new state."""

    def __init__(self, *, quiet: bool, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._bar: Bar | None = None
        self._drawn: BarColumn | None = None
        self._task: TaskID | None = None
        self._last_line_at: float | None = None
        self._last_note = ""

    def __enter__(self) -> ProgressView:
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            self._drawn = BarColumn(bar_width=_BAR_WIDTHS[0])
            self._bar = Bar(
                SpinnerColumn(),
                self._drawn,
                TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True)),
                console=Console(file=self._stream),
                transient=True,
                refresh_per_second=4,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None, line="starting")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """One line of text, above the bar where there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def __call__(self, progress: Progress) -> None:
        """Show ``progress``."""
        if progress.note and progress.note != self._last_note:
            self.say(progress.note)
        self._last_note = progress.note
        if self._quiet:
            return
        if self._bar is not None and self._task is not None and self._drawn is not None:
            width = self._bar.console.width - _SPINNER_WIDTH
            line = progress_line(progress, width - _BAR_WIDTHS[-1] - 1)
            room = width - len(line) - 1
            self._drawn.bar_width = next((w for w in _BAR_WIDTHS if w <= room), _BAR_WIDTHS[-1])
            self._bar.update(
                self._task,
                total=max(1, progress.total_rows),
                completed=progress.done.rows,
                line=line,
            )
            return
        now = time.monotonic()
        if self._last_line_at is None or now - self._last_line_at >= _LINE_EVERY_S:
            self._last_line_at = now
            print(progress_line(progress), file=self._stream, flush=True)


def progress_line(progress: Progress, width: int | None = None) -> str:
    """One line: rows, failed rows, right answers, tokens a second, time left, workers. In less than
    ``width`` columns only what fits, the rows and the time left before all else."""
    done = progress.done
    share = done.rows / progress.total_rows if progress.total_rows else 1.0
    states = ", ".join(f"{count} {state}" for state, count in progress.workers.items() if count)
    accuracy = None if done.scores is None else done.scores.accuracy
    parts = {
        "rows": f"{done.rows:,}/{progress.total_rows:,} rows ({share:.0%})",
        "failed": f"{done.failed_rows:,} failed" if done.failed_rows else "",
        "right": "" if accuracy is None else f"{accuracy.value:.1%} right",
        "tokens": f"{progress.tokens_per_s:,.0f} tokens/s",
        "eta": f"ETA {'--' if progress.eta_s is None else duration(progress.eta_s)}",
        "workers": f"workers: {states}" if states else "",
    }
    line = " · ".join(part for part in parts.values() if part)
    for shorter in ("workers", "right", "tokens", "workers", "failed"):
        if width is None or len(line) <= width:
            break
        # The states of workers are worth more than the word before them.
        long = shorter == "workers" and parts["workers"].startswith("workers: ")
        parts[shorter] = states if long else ""
        line = " · ".join(part for part in parts.values() if part)
    return line
