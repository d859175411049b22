"""``batchrun schema``"""

from __future__ import annotations

import click

from batchrun.cli.options import debug_option, echo_json


@click.command(
    epilog="Example: batchrun schema > batchrun.schema.json, and in the job's first line "
    "`# yaml-language-server: $schema=batchrun.schema.json`"
)
@debug_option
def command() -> None:
    """Print the JSON Schema of the job file, for editors."""
    from batchrun.job import json_schema

    echo_json(json_schema())
