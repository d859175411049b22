"""``batchrun.run``: a job run from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchrun.cluster.driver import run_job
from batchrun.cluster.summary import Summary
from batchrun.events import OutcomeKind
from batchrun.job import Job, parse_job
from batchrun.jobfile import JobSource, read_job_file


def run(
    job: str | os.PathLike[str] | Mapping[str, object] | Job,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    deterministic: bool = False,
    keep_finished: bool = False,
) -> Summary:
    """Run a job and return its summary.

    ``job`` is the path of a job file (``overrides`` are then like ``--set`` of the command line),
    the same as nested dictionaries, or a job that was parsed already. ``address`` None starts a
    Ray on this machine and stops it again, unless this process is connected to a cluster: then
    that one is used. ``address="auto"`` or a URL joins a cluster. ``keep_finished`` is
    ``--keep-finished``: of another job's run in the output the finished parts stay.

    A run in which too many rows failed has a summary like any other: look at its ``exit_code``.

    Raises:
        BatchrunError: The run could not begin or could not go on; :mod:`batchrun.errors` has all.
    """
    source: JobSource | None = None
    match job:
        case Job():
            parsed = job
        case Mapping():
            source = JobSource.of_mapping(job)
            parsed = parse_job(source)
        case _:
            source = read_job_file(str(Path(job)), tuple(overrides))
            parsed = parse_job(source)
    summary = run_job(
        parsed,
        source=source,
        address=address,
        deterministic=deterministic,
        keep_finished=keep_finished,
    )
    finished = (OutcomeKind.SUCCESS, OutcomeKind.TOO_MANY_FAILURES, OutcomeKind.CANARY_FAILED)
    if summary.error is not None and summary.outcome not in finished:
        raise summary.error
    return summary
