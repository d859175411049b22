"""What ``submit`` and ``run`` have in common: read the job, run it, show it, say how it ended."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from batchrun.cli import echo_error
from batchrun.cli.options import echo_json
from batchrun.cli.progress import ProgressView
from batchrun.cli.scores import score_lines
from batchrun.logs import log_file
from batchrun.wording import duration

if TYPE_CHECKING:
    from batchrun.cluster.summary import Retried, Summary
    from batchrun.job import Job
    from batchrun.jobfile import JobSource


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is shown, whether it is deterministic, and whether another job's parts stay."""

    as_json: bool
    quiet: bool
    deterministic: bool
    keep_finished: bool = False
    log_file: str | None = None


def run_options(command: Any) -> Any:
    """Adds ``--deterministic``, ``--log-file`` and ``--quiet``."""
    command = click.option(
        "--log-file",
        metavar="FILE",
        envvar="BATCHRUN_LOG_FILE",
        help="Append what happens to the run as JSON lines; - is stderr.",
    )(command)
    command = click.option(
        "--deterministic",
        is_flag=True,
        help="Texts equal to the byte however the work is spread; slower.",
    )(command)
    return click.option("-q", "--quiet", is_flag=True, help="No progress, only errors.")(command)


def keep_option(command: Any) -> Any:
    """Adds ``--keep-finished``."""
    return click.option(
        "--keep-finished",
        is_flag=True,
        help="For a job that changed: keep the parts that are finished, run the rest with it.",
    )(command)


def run_and_report(job: Job, source: JobSource, address: str | None, options: RunOptions) -> int:
    """Run the job in the foreground; the exit code. Errors of the run are raised."""
    from batchrun.cluster.driver import run_job

    def run(stop: threading.Event, view: ProgressView) -> Summary:
        return run_job(
            job,
            source=source,
            address=address,
            deterministic=options.deterministic,
            keep_finished=options.keep_finished,
            stop=stop,
            view=view,
        )

    return report(run, options)


def report(run: Callable[[threading.Event, ProgressView], Summary], options: RunOptions) -> int:
    """Have ``run`` do its work in the foreground, and say how it ended; the exit code."""
    with (
        stop_on_signals() as stop,
        logged_to(options.log_file),
        ProgressView(quiet=options.quiet) as view,
    ):
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints there what befell its daemons
            summary = run(stop, view)
    if options.as_json:
        echo_json(summary.to_json())
    if summary.error is not None:
        raise summary.error
    if not options.quiet:
        echo_error(summary_text(summary))
    return 0


@contextlib.contextmanager
def logged_to(path: str | None) -> Iterator[None]:
    """:func:`batchrun.logs.log_file`, where a file that cannot be written is a wrong command."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(log_file(path))
        except OSError as error:
            raise click.BadParameter(
                f"{path}: {error.strerror}", param_hint="'--log-file'"
            ) from error
        yield


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def summary_text(summary: Summary) -> str:
    """The end of a run, in a few lines."""
    counts = summary.counts
    lines = [f"done: {counts.rows:,} rows in {summary.output}"]
    if summary.failed_rows:
        lines[0] += f", {summary.failed_rows:,} of them failed (see the column `error`)"
    if summary.retried is not None:
        lines += _retried_lines(summary.retried)
    elif summary.generated_rows < counts.rows:
        lines.append(f"  {summary.generated_rows:,} of them in this submit")
    tokens = f"{counts.reasoning_tokens:,} of reasoning, {counts.completion_tokens:,} of completion"
    lines.append(f"  tokens: {counts.prompt_tokens:,} of prompt, {tokens}")
    if counts.scores is not None:
        lines += [f"  {line}" for line in score_lines(counts.scores)]
    if counts.malformed_tool_calls:
        lines.append(
            f"  tool calls that cannot be read, kept as text: {counts.malformed_tool_calls:,}"
        )
    if summary.prefix_tokens:
        lines.append(
            f"  {summary.prefix_tokens:,} tokens of prompts were not computed again, "
            "as their beginning was shared"
        )
    if summary.elapsed_s:
        rate = summary.generated_tokens / summary.elapsed_s
        lines.append(f"  took {duration(summary.elapsed_s)}, {rate:,.0f} tokens/s with the start")
    if summary.restarts:
        lines.append(
            f"  {summary.restarts} workers were replaced, "
            f"{summary.discarded_tokens:,} tokens generated again"
        )
    return "\n".join(lines)


def _retried_lines(retried: Retried) -> list[str]:
    lines = []
    if retried.rows:  # else the beginning has said that there was nothing to do
        lines.append(f"  {retried.done:,} rows were tried again, {retried.healed:,} of them healed")
    if retried.unfinished_shards:
        left = f"{retried.unfinished_shards:,} shards are not finished yet"
        lines.append(f"  {left}: submit the job to run them")
    return lines
