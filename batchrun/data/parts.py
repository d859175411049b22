"""Commit records of parts: writing them, reading them, and making them again from a part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun.data.store import Store
from batchrun.errors import OutputError, ShardError
from batchrun.records import Counts, Part, Shard
from batchrun.scores import Scores, Verdict
from batchrun.tools import is_malformed

RUN_KEY = "batchrun.run"
MAJORITY_KEY = "batchrun.majority_correct"
"""In the footer of a part with scores: rows whose most frequent answer is right. The rest of the
counts can be told from the part's columns, this one cannot."""
CALLS_COLUMN = "tool_calls"
_HASH_CHUNK_BYTES = 8 << 20


def part_to_json(part: Part) -> bytes:
    """A part as the content of its commit record."""
    return json.dumps(asdict(part), indent=1).encode()


def part_from_json(data: bytes) -> Part:
    """What :func:`part_to_json` gave. Raises ValueError for anything else."""
    try:
        raw = json.loads(data)
        return Part(**{**raw, "counts": Counts.from_json(raw["counts"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a commit record: {error}") from error


def part_metadata(run: str, shard: Shard, num_rows: int, sha256: str) -> dict[str, str]:
    """What a part's object says of itself, beside its bytes."""
    return {
        "batchrun-run": run,
        "batchrun-shard": str(shard.number),
        "batchrun-rows": str(num_rows),
        "batchrun-sha256": sha256,
    }


def digest_of(source: BinaryIO) -> tuple[int, str]:
    """How many bytes a file has from here on, and their SHA-256 in hex."""
    digest = hashlib.sha256()
    size = 0
    while chunk := source.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def part_from_object(store: Store, run: str, shard: Shard, name: str, n: int) -> Part:
    """The part at ``name``, described by reading it.

    Raises :class:`~batchrun.errors.ShardError` when the object is not the part of this shard and
    run. It is then left alone: a person decides.
    """
    with store.open_file(name) as source:
        size, sha256 = digest_of(source)
        source.seek(0)
        try:
            with pq.ParquetFile(source) as parquet:
                metadata = parquet.schema_arrow.metadata or {}
                num_rows = parquet.metadata.num_rows
                if metadata.get(RUN_KEY.encode()) != run.encode():
                    raise ValueError("it names another run")
                if num_rows != shard.num_rows * n:
                    raise ValueError(f"it has {num_rows} rows, not {shard.num_rows * n}")
                counts = _count(parquet, shard.num_rows, n)
        except (pa.ArrowException, ValueError, KeyError, OSError) as error:
            raise ShardError(
                f"{store.url}/{name} is not the part of this run ({error})",
                "move it away, or choose another output",
            ) from error
    return Part(
        shard=shard.number,
        name=name,
        attempt="",
        size_bytes=size,
        sha256=sha256,
        num_rows=num_rows,
        counts=counts,
    )


def _count(parquet: pq.ParquetFile, num_rows: int, n: int) -> Counts:
    names = ["prompt_tokens", "reasoning_tokens", "completion_tokens", "thinking_budget_hit"]
    table = parquet.read([*names, "error"], use_threads=False)
    sums = [int(pc.sum(table.column(name)).as_py() or 0) for name in names]
    errors = table.column("error").is_valid().to_pylist()
    failed = sum(any(errors[start : start + n]) for start in range(0, len(errors), n))
    prompt, reasoning, completion, hits = sums
    scores = _count_scores(parquet, n)
    malformed, empty = _count_texts(parquet)
    return Counts(num_rows, failed, prompt, reasoning, completion, hits, scores, malformed, empty)


def is_empty(completion: str | None, has_calls: bool) -> bool:
    """Whether a sample came back with nothing: neither an error, nor a text, nor a tool call."""
    return completion == "" and not has_calls


def _count_texts(parquet: pq.ParquetFile) -> tuple[int, int]:
    """Samples whose completion kept a tool call that is none, and samples with nothing at all."""
    has_tools = CALLS_COLUMN in parquet.schema_arrow.names
    columns = ["completion", CALLS_COLUMN] if has_tools else ["completion"]
    malformed = empty = 0
    for batch in parquet.iter_batches(columns=columns, use_threads=False):
        texts = batch.column(0).to_pylist()
        has_calls = batch.column(1).is_valid().to_pylist() if has_tools else [False] * len(texts)
        for text, calls in zip(texts, has_calls, strict=True):
            malformed += has_tools and is_malformed(text, () if calls else None)
            empty += is_empty(text, calls)
    return malformed, empty


def _count_scores(parquet: pq.ParquetFile, n: int) -> Scores | None:
    majority = (parquet.metadata.metadata or {}).get(MAJORITY_KEY.encode())
    if majority is None or parquet.metadata.num_rows == 0:
        return None
    verdicts = parquet.read(["correct"], use_threads=False).column("correct").to_pylist()
    scores = Scores()
    for start in range(0, len(verdicts), n):
        scores += Scores.of_row([Verdict(value) for value in verdicts[start : start + n]])
    return replace(scores, majority_correct=int(majority))


def check_part(store: Store, part: Part, sizes: Mapping[str, int]) -> None:
    """Raise unless the listing still shows the part as its commit record describes it."""
    found = sizes.get(part.name)
    if found == part.size_bytes:
        return
    what = "is missing" if found is None else f"has {found} bytes, not {part.size_bytes}"
    raise OutputError(
        f"output: the finished part {store.url}/{part.name} {what}",
        "put it back, choose another output, or run `batchrun discard OUTPUT` first",
    )
