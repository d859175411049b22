"""``batchrun submit``"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from batchrun.cli import echo_error
from batchrun.cli.options import debug_option, echo_json, job_argument, json_option, set_option
from batchrun.cli.runner import RunOptions, keep_option, run_and_report, run_options
from batchrun.errors import BatchrunError, InterruptedRunError

if TYPE_CHECKING:
    from batchrun.cluster.jobs import ClusterJob, ClusterJobs
    from batchrun.job import Job
    from batchrun.jobfile import JobSource


@click.command(epilog="Example: batchrun submit jobs/demo.yaml --set generation.n=4")
@job_argument
@set_option
@click.option(
    "--address",
    metavar="URL",
    help="The dashboard of a Ray cluster; default: ray.address of the job, or RAY_ADDRESS.",
)
@click.option(
    "--wait", is_flag=True, help="On a cluster: follow the run and exit with its exit code."
)
@click.option(
    "--skip-checks",
    is_flag=True,
    help="On a cluster: do not look at input, model and output from here.",
)
@keep_option
@run_options
@json_option
@debug_option
def command(
    job_path: str,
    overrides: tuple[str, ...],
    address: str | None,
    wait: bool,
    skip_checks: bool,
    keep_finished: bool,
    deterministic: bool,
    log_file: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run a job: on a Ray cluster with --address, else on this machine.

    On a cluster it is submitted through Ray's Jobs API; the id of the run and the address of its
    dashboard page are printed, and `batchrun list`, `logs` and `cancel` take the id.

    Without an address Ray is started here, the job runs in the foreground with live progress, and
    Ray is stopped again. Ctrl-C stops it with exit code 75. In both cases the same command after
    whatever happened resumes the run: what is finished stays.

    With --log-file what happens to workers, shards and rows is appended to a file, one JSON object
    a line, to be searched for a shard or a row; on a cluster it is a file of the node that the run
    is driven from, and - puts the lines where `batchrun logs` shows them.
    """
    from batchrun.job import parse_job
    from batchrun.jobfile import read_job_file

    source = read_job_file(job_path, overrides)
    job = parse_job(source)
    where = address or job.ray.address or os.environ.get("RAY_ADDRESS")
    if where:
        run_id = "" if skip_checks else _checked(job, source, keep_finished=keep_finished)
        flags = ["--deterministic"] if deterministic else []
        flags += ["--keep-finished"] if keep_finished else []
        flags += [] if log_file is None else ["--log-file", log_file]
        return submit_to(where, job, "run", flags, run_id=run_id, wait=wait, as_json=as_json)
    if wait or skip_checks:
        flag = "--wait" if wait else "--skip-checks"
        raise click.UsageError(f"{flag} is for a cluster: give --address")
    options = RunOptions(as_json, quiet, deterministic, keep_finished, log_file)
    return run_and_report(job, source, None, options)


def _checked(job: Job, source: JobSource, *, keep_finished: bool) -> str:
    """The id of the run, once everything that can be known beforehand is right."""
    from batchrun.cluster.opening import check

    return check(job, source, keep_finished=keep_finished).run


def submit_to(
    address: str,
    job: Job,
    command: str,
    flags: Sequence[str],
    *,
    run_id: str = "",
    wait: bool,
    as_json: bool,
) -> int:
    """Start ``batchrun COMMAND`` for a job on the cluster with this dashboard; the exit code."""
    from batchrun.cluster.jobs import ClusterJobs

    jobs = ClusterJobs(address)
    job_id = jobs.submit(job, run_id=run_id, command=command, flags=flags)
    if not as_json:
        click.echo(f"{job_id}\n{jobs.url(job_id)}")
    if not wait:
        if as_json:
            echo_json(_submitted(jobs, jobs.get(job_id)))
        return 0
    try:
        for text in jobs.follow(job_id):
            click.echo(text, nl=False, err=True)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"not followed any longer; {job_id} goes on",
            f"`batchrun logs {job_id} -f` follows it again, `batchrun cancel {job_id}` stops it",
        ) from None
    ended = jobs.wait(job_id)
    if as_json:
        echo_json(_submitted(jobs, ended))
    return _exit_code(ended)


def _submitted(jobs: ClusterJobs, job: ClusterJob) -> dict[str, object]:
    return {**job.to_json(), "dashboard": jobs.url(job.id)}


def _exit_code(job: ClusterJob) -> int:
    """That of the run; where Ray ended it before it could say one, what fits best."""
    from batchrun.cluster.jobs import JobState

    match job.state:
        case JobState.SUCCEEDED:
            return 0
        case JobState.STOPPED:
            raise InterruptedRunError(
                f"{job.id} was stopped", "what it had saved is kept; submit again to resume"
            )
    if job.exit_code is not None and job.exit_code > 0:
        echo_error(f"{job.id} ended with exit code {job.exit_code}")
        return job.exit_code
    raise BatchrunError(
        f"{job.id} failed before the run could say why: {job.message}",
        "what it had saved is kept; submit again to resume",
    )
