"""``batchrun cancel``"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from batchrun.cli import echo_error
from batchrun.cli.cluster import address_option, open_jobs
from batchrun.cli.options import debug_option, echo_json, json_option
from batchrun.errors import BatchrunError

if TYPE_CHECKING:
    from batchrun.cluster.jobs import ClusterJob


@click.command(epilog="Example: batchrun cancel support-summaries-4e9d0b11-a1b2c3 --grace 120")
@click.argument("job_id", metavar="ID")
@click.option(
    "--grace",
    "grace_s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the run may take to save what it has before Ray ends it.",
)
@address_option
@json_option
@debug_option
def command(job_id: str, grace_s: float, address: str | None, as_json: bool) -> int:
    """Stop a run on a Ray cluster. What is finished is kept; submitting again resumes it.

    The run is asked first, through the storage it writes to: it saves finished rows and the tokens
    of unfinished ones, and ends with exit code 75. After --grace, Ray ends it in any case.
    """
    jobs = open_jobs(address)
    job, by_itself = jobs.cancel(job_id, _ask, grace_s)
    if as_json:
        echo_json({**job.to_json(), "drained": by_itself})
    else:
        echo_error(_text(job, by_itself))
    return 0


def _text(job: ClusterJob, by_itself: bool) -> str:
    """How the run ended, and what can be done now."""
    if job.exit_code == 0:
        return f"{job.id} is finished: nothing is left to stop"
    if by_itself:
        return f"{job.id} is over: {job.verdict}; submit the job again to resume it"
    return (
        f"{job.id} was ended by Ray: {job.verdict}; what it had saved is kept, submit the job "
        "again to resume it"
    )


def _ask(job: ClusterJob) -> bool:
    """Ask the run to drain; whether it can hear that."""
    from batchrun.data.cancel import request_cancel
    from batchrun.data.jobrecord import find_run
    from batchrun.data.store import Store

    try:
        store = Store.open(job.output, job.storage_options)
        run = job.run_id or find_run(store)
        if run is None:
            return False  # it has not begun
        request_cancel(store, run)
    except BatchrunError as error:
        echo_error(f"cannot ask the run to drain: {error.message}")
        return False
    echo_error("asked the run to save what it has and stop")
    return True
