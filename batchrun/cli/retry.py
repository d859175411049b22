"""``batchrun retry``"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import click

from batchrun.cli.options import debug_option, json_option, set_option
from batchrun.cli.progress import ProgressView
from batchrun.cli.runner import RunOptions, report, run_options
from batchrun.cli.status import names_a_job
from batchrun.cli.submit import submit_to

if TYPE_CHECKING:
    from batchrun.cluster.summary import Summary
    from batchrun.records import ErrorKind


@click.command(epilog="Example: batchrun retry out/demo --errors timeout,worker_lost")
@click.argument("where", metavar="OUTPUT_OR_JOB")
@click.option(
    "--errors",
    "errors",
    metavar="KIND,...",
    help="Which rows, by what the column `error` begins with; default: timeout,worker_lost,engine.",
)
@set_option
@click.option(
    "--address",
    metavar="URL",
    help="The Ray cluster: its dashboard (http://...) as for `batchrun submit`, or its head as for "
    "`batchrun run`; default: ray.address of the job, RAY_ADDRESS, or a Ray of its own here.",
)
@run_options
@json_option
@debug_option
def command(
    where: str,
    errors: str | None,
    overrides: tuple[str, ...],
    address: str | None,
    deterministic: bool,
    log_file: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run the rows again that failed with some errors, and put their parts anew.

    Samples that did not fail so stay as they are. OUTPUT_OR_JOB is an output, whose run knows its
    job, or the job file that wrote it: then keys that do not determine the content, such as
    errors.row_timeout_s or resources, come from the file. What was cut off goes on with the same
    command. With the address of a dashboard it runs as a job of that cluster, and is followed to
    its end.
    """
    from batchrun.cluster.rerun import recorded_job, retry_job
    from batchrun.job import parse_job
    from batchrun.jobfile import read_job_file

    kinds = _kinds(errors)
    model_path = None
    if names_a_job(where):
        source = read_job_file(where, overrides)
    else:
        source, model_path = recorded_job(where, overrides)
    job = parse_job(source)
    place = address or job.ray.address or os.environ.get("RAY_ADDRESS")

    if place and place.startswith(("http://", "https://")):
        flags = ["--errors", ",".join(kinds), *(["--deterministic"] if deterministic else [])]
        flags += [] if log_file is None else ["--log-file", log_file]
        return submit_to(place, job, "retry", flags, wait=True, as_json=as_json)

    def run(stop: threading.Event, view: ProgressView) -> Summary:
        return retry_job(
            job,
            kinds,
            source=source,
            model_path=model_path,
            address=place,
            deterministic=deterministic,
            stop=stop,
            view=view,
        )

    return report(run, RunOptions(as_json, quiet, deterministic, log_file=log_file))


def _kinds(errors: str | None) -> tuple[ErrorKind, ...]:
    """The kinds that ``--errors`` names."""
    from batchrun.records import HEALING, ErrorKind
    from batchrun.wording import nearest

    if errors is None:
        return HEALING
    known = [kind.value for kind in ErrorKind]
    names = [name.strip() for name in errors.split(",") if name.strip()]
    for name in names:
        if name not in known:
            close = nearest(name, known)
            raise click.UsageError(
                f"--errors: there is no error {name!r}"
                + (f", did you mean {close}?" if close else ".")
                + f" The kinds are {', '.join(known)}"
            )
    if not names:
        raise click.UsageError(f"--errors names no error; the kinds are {', '.join(known)}")
    return tuple(ErrorKind(name) for name in dict.fromkeys(names))
