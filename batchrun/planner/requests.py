"""Requests to object storage that a run makes: they cost money, and take time."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.data.border import scheme_of
from batchrun.job import Job

_BLOCK_BYTES = 4 << 20
_LISTED = 1000
_PROGRESS_S, _BEAT_S = 3.0, 5.0


@dataclass(frozen=True, slots=True)
class Requests:
    """``count`` requests of a kind, for a reason in words."""

    kind: str
    count: float
    made_of: str


def count_requests(
    job: Job,
    *,
    num_files: int,
    size_bytes: int,
    num_shards: float,
    seconds: float,
    workers: int,
) -> tuple[Requests, ...]:
    """What a run of ``seconds`` asks of object storage; nothing where all of it is local.

    ``size_bytes`` are those of the input; all figures are the whole run's.
    """
    found: list[Requests] = []
    paths = job.input.path if isinstance(job.input.path, tuple) else (job.input.path,)
    if any(scheme_of(path) != "file" for path in paths):
        pages = len(paths) * (1 + num_files // _LISTED)
        blocks = size_bytes / _BLOCK_BYTES + num_shards
        found += [
            Requests("list input", 2 * pages, f"{num_files:,} files, {_LISTED:,} a page, twice"),
            Requests("get footers", 4 * num_files, f"{num_files:,} files, 2 each, twice"),
            Requests(
                "get rows",
                blocks + 4 * num_shards,
                f"{num_shards:,.0f} shards: 2 heads and 2 for the footer each, and "
                f"{size_bytes / 1e6:,.1f} MB in blocks of 4 MiB",
            ),
        ]
    if scheme_of(job.output.path) != "file":
        interval = job.checkpoint.interval_s
        found += [
            Requests("put parts", num_shards, f"{num_shards:,.0f} shards, one each"),
            Requests("put and get records", 2 * num_shards, "one of each for every part"),
            Requests(
                "put journal",
                workers * seconds / interval,
                f"at most one a worker every {interval:g} s",
            ),
            Requests("put progress", seconds / _PROGRESS_S, f"one every {_PROGRESS_S:g} s"),
            Requests("put lock", seconds / _BEAT_S, f"one every {_BEAT_S:g} s"),
        ]
    return tuple(found)
