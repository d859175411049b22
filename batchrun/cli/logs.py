"""``batchrun logs``"""

from __future__ import annotations

import click

from batchrun.cli.cluster import address_option, open_jobs
from batchrun.cli.options import debug_option


@click.command(epilog="Example: batchrun logs support-summaries-4e9d0b11-a1b2c3 -f")
@click.argument("job_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@address_option
@debug_option
def command(job_id: str, follow: bool, address: str | None) -> int:
    """Print what a run on a Ray cluster has printed. Ctrl-C ends the following, not the run."""
    jobs = open_jobs(address)
    jobs.get(job_id)
    if not follow:
        click.echo(jobs.logs(job_id), nl=False)
        return 0
    for text in jobs.follow(job_id):
        click.echo(text, nl=False)
    return 0
