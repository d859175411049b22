"""``batchrun discard``"""

from __future__ import annotations

import click

from batchrun.cli import echo_error
from batchrun.cli.options import debug_option, echo_json, json_option
from batchrun.cli.status import open_output


@click.command(epilog="Example: batchrun discard out/demo --yes")
@click.argument("where", metavar="OUTPUT_OR_JOB")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@debug_option
def command(where: str, yes: bool, as_json: bool) -> int:
    """Delete a run's parts and bookkeeping, after asking.

    Only what the run wrote is deleted. Refuses while the run is live, with exit code 4.
    """
    from batchrun.data.status import discard

    store = open_output(where)
    if not yes:
        click.confirm(f"Delete the run in {store.url}?", abort=True, err=True)
    num_deleted = discard(store)
    if as_json:
        echo_json({"output": store.url, "deleted": num_deleted})
    else:
        echo_error(f"deleted {num_deleted:,} objects of {store.url}")
    return 0
