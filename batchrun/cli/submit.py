"""``batchrun submit``"""

from __future__ import annotations

import os

import click

from batchrun.cli.options import debug_option, job_argument, json_option, set_option
from batchrun.cli.runner import RunOptions, run_and_report, run_options
from batchrun.errors import JobError, Problem


@click.command(epilog="Example: batchrun submit jobs/demo.yaml --set generation.n=4")
@job_argument
@set_option
@click.option("--address", metavar="URL", help="A Ray cluster (not available in this version).")
@run_options
@json_option
@debug_option
def command(
    job_path: str,
    overrides: tuple[str, ...],
    address: str | None,
    deterministic: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run a job on this machine, with live progress.

    Starts Ray here, runs the job in the foreground and stops Ray again. The same command after
    whatever happened resumes the run: what is finished stays. Ctrl-C stops it with exit code 75.
    """
    from batchrun.job import parse_job
    from batchrun.jobfile import read_job_file

    source = read_job_file(job_path, overrides)
    job = parse_job(source)
    for place, value in (
        ("--address", address),
        (source.place("ray.address"), job.ray.address),
        ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS")),
    ):
        if value:
            raise _no_cluster_yet(place)
    return run_and_report(job, source, None, RunOptions(as_json, quiet, deterministic))


def _no_cluster_yet(place: str) -> JobError:
    return JobError(
        (
            Problem(
                place,
                "ray.address",
                "submitting to a Ray cluster is not available in this version",
                "run `batchrun run JOB.yaml` on a node of the cluster",
            ),
        )
    )
