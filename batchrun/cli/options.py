"""Options that several commands share."""

from __future__ import annotations

import json
from typing import Any

import click

from batchrun.cli import debug_option

__all__ = ["debug_option", "echo_json", "job_argument", "json_option", "set_option"]


def job_argument(command: Any) -> Any:
    """``JOB``, passed as ``job_path``: the job file."""
    return click.argument("job_path", metavar="JOB.yaml", type=click.Path())(command)


def set_option(command: Any) -> Any:
    """``--set key.path=value``, any number of times, passed as ``overrides``: a tuple of texts."""
    return click.option(
        "--set",
        "overrides",
        metavar="KEY.PATH=VALUE",
        multiple=True,
        help="Override a key of the job, e.g. --set generation.max_tokens=256. Can be repeated.",
    )(command)


def json_option(command: Any) -> Any:
    """``--json``, passed as ``as_json``: one JSON document on stdout instead of text."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on stdout."
    )(command)


def echo_json(document: object) -> None:
    """Print ``document`` on stdout, the only thing there."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
