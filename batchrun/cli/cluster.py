"""What the commands about runs on a cluster share: its address, a job as a line of text."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import click

from batchrun.wording import duration

if TYPE_CHECKING:
    from batchrun.cluster.jobs import ClusterJob, ClusterJobs

DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def address_option(command: Any) -> Any:
    """``--address``: the cluster's dashboard."""
    return click.option(
        "--address",
        metavar="URL",
        help=f"The cluster's dashboard; default: RAY_ADDRESS, or {DEFAULT_ADDRESS}.",
    )(command)


def open_jobs(address: str | None) -> ClusterJobs:
    """The jobs of the cluster at ``address``, or of the one that the environment names."""
    from batchrun.cluster.jobs import ClusterJobs

    return ClusterJobs(address or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS)


def job_table(jobs: list[ClusterJob]) -> str:
    """One line a run, under a heading."""
    rows = [("ID", "STATE", "AGE", "TOOK", "OUTPUT")]
    now = time.time()
    for job in jobs:
        age = took = "--"
        if job.started_at is not None:
            age = duration(max(0.0, now - job.started_at))
            took = duration(max(0.0, (job.ended_at or now) - job.started_at))
        rows.append((job.id, job.verdict, age, took, job.output))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )
