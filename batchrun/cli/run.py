"""``batchrun run``"""

from __future__ import annotations

import os

import click

from batchrun.cli.options import debug_option, job_argument, json_option, set_option
from batchrun.cli.runner import RunOptions, keep_option, run_and_report, run_options


@click.command(epilog="Example: batchrun run jobs/classify.yaml --address ray-head:6379")
@job_argument
@set_option
@click.option(
    "--address",
    metavar="URL",
    help="The Ray cluster; default: ray.address of the job, RAY_ADDRESS, or the one on this node.",
)
@keep_option
@run_options
@json_option
@debug_option
def command(
    job_path: str,
    overrides: tuple[str, ...],
    address: str | None,
    keep_finished: bool,
    deterministic: bool,
    log_file: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run a job in the foreground inside an existing Ray cluster.

    Meant for a node of the cluster. The same command resumes the run after whatever happened.
    """
    from batchrun.job import parse_job
    from batchrun.jobfile import read_job_file

    source = read_job_file(job_path, overrides)
    job = parse_job(source)
    where = address or job.ray.address or os.environ.get("RAY_ADDRESS") or "auto"
    options = RunOptions(as_json, quiet, deterministic, keep_finished, log_file)
    return run_and_report(job, source, where, options)
