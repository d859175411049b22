"""``batchrun list``"""

from __future__ import annotations

import click

from batchrun.cli import echo_error
from batchrun.cli.cluster import address_option, job_table, open_jobs
from batchrun.cli.options import debug_option, echo_json, json_option


@click.command(epilog="Example: batchrun list --address http://127.0.0.1:8265")
@address_option
@json_option
@debug_option
def command(address: str | None, as_json: bool) -> int:
    """List the runs that were submitted to a Ray cluster, the newest first.

    A cluster forgets its jobs when it is stopped; `batchrun status OUTPUT` never does.
    """
    jobs = open_jobs(address).list()
    if as_json:
        echo_json([job.to_json() for job in jobs])
    elif jobs:
        click.echo(job_table(jobs))
    else:
        echo_error("no runs: `batchrun submit JOB.yaml --address URL` starts one")
    return 0
