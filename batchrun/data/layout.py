"""Names: where everything of a run stands below its output. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from batchrun.records import Shard

FOLDER = "_batchrun"
SUCCESS = "_SUCCESS"
LOCK = f"{FOLDER}/lock.json"
PART_NAME = re.compile(r"part-\d{6,}-[0-9a-f]{8}\.parquet")
PLAN_NAME = re.compile(r"plan-(\d{4,})\.parquet")
KEPT_NAME = re.compile(r"kept-(\d{4,})\.json")
RETRY_PLAN_NAME = re.compile(r"plan-(\d{4,})\.json")
STAGED_NAME = re.compile(r"(\d{6,})-(\d{4,})\.(parquet|json)")
MANIFEST_NAME = re.compile(r"manifest-(\d{4,})\.json")


def canonical_json(value: object) -> str:
    """One spelling of a JSON value, so that equal values have equal hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def run_id(semantic: Mapping[str, object]) -> str:
    """The id of the run of a job: 16 hex digits of what determines its content."""
    return hashlib.sha256(canonical_json(semantic).encode()).hexdigest()[:16]


def part_name(run: str, shard: Shard) -> str:
    """The name of a shard's part.

    It is made of the run and of the very input bytes, so that a worker of another run, or of
    another version of the input, can never take it.
    """
    return f"part-{shard.number:06d}-{shard_digest(run, shard)[:8]}.parquet"


def traces_path(run: str, shard: Shard) -> str:
    """The sampled tokens of a shard's part. Named by the rows themselves: another run of the same
    input may number its shards otherwise."""
    return f"{run_folder(run)}/traces/{shard_digest(run, shard)}.parquet"


def journal_folder(run: str, shard: int | None = None) -> str:
    """Where the journal of a shard is, or those of all."""
    folder = f"{run_folder(run)}/journal"
    return folder if shard is None else f"{folder}/{shard:06d}"


def history_path(run: str, epoch: int) -> str:
    """How the run went under one driver, over time."""
    return f"{run_folder(run)}/history/{epoch:06d}.json"


def strikes_folder(run: str) -> str:
    """Where it is recorded which rows were in work when a worker died."""
    return f"{run_folder(run)}/strikes"


def retries_folder(run: str) -> str:
    """Where retries of failed rows are planned, staged and recorded."""
    return f"{run_folder(run)}/retries"


def retry_plan_path(run: str, number: int) -> str:
    """The create-only record of what a retry set out to do; numbers count from 1."""
    return f"{retries_folder(run)}/plan-{number:04d}.json"


def staged_path(run: str, shard: int, number: int) -> str:
    """The new part of a shard until it stands in its place; its record ends in ``.json``."""
    return f"{retries_folder(run)}/{shard:06d}-{number:04d}.parquet"


def shard_digest(run: str, shard: Shard) -> str:
    """What tells the rows of a shard, down to their bytes, from all others."""
    pinned = [
        run,
        shard.path,
        shard.size_bytes,
        shard.fingerprint,
        list(shard.row_groups),
        shard.first_row,
        shard.num_rows,
    ]
    return hashlib.sha256(canonical_json(pinned).encode()).hexdigest()


def run_folder(run: str) -> str:
    """The folder of a run's bookkeeping.

    In it: ``job.json``; ``plan-<n>.parquet`` and ``.json``; ``epochs/``, one a driver;
    ``parts/`` and ``failed/``, one a shard; ``traces/``, one a shard, where the run keeps them;
    ``journal/<shard>/<attempt>-<seq>.zst``, of shards in work; ``strikes/<epoch>-<worker>.json``,
    one a worker that died; ``history/``, one a driver; ``retries/``; ``kept-<n>.json``, where parts
    of an earlier run were kept; ``progress.json``; ``manifest-<n>.json``.
    """
    return f"{FOLDER}/{run}"


def epochs_folder(run: str) -> str:
    """Where the drivers of a run are counted."""
    return f"{run_folder(run)}/epochs"


def epoch_path(run: str, epoch: int) -> str:
    """The create-only record that one driver took the run under this number."""
    return f"{epochs_folder(run)}/{epoch:06d}.json"


def commit_path(run: str, shard: int) -> str:
    """The create-only record of a shard's published part."""
    return f"{run_folder(run)}/parts/{shard:06d}.json"


def failed_path(run: str, shard: int) -> str:
    """The record of why a shard could not be run in the latest submit."""
    return f"{run_folder(run)}/failed/{shard:06d}.json"
