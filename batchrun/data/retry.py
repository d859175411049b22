"""Trying failed rows of published parts again: the one thing that ever replaces a part.

1. The driver plans a retry: ``retries/plan-<k>.json`` says which rows of which shards.
2. A worker makes the shard's part anew, of the rows that were good and of what the retried ones
   gave this time. It stages the part as ``retries/<shard>-<k>.parquet`` and records beside it
   which part it replaces. Both are create-only.
3. The driver, who holds the run lock, copies the staged part over the old one, replaces the
   commit record, and deletes the staged part.

A copy is one step of the store, so a reader sees the old part or the new one. Whoever opens the
run next finishes what was cut off: while a staged part with a record is there, step 3 is repeated.
So a part has been replaced when its record is there and the staged part is not. Only what the
newest plan asked for takes a place; what older retries staged is swept, unless it stands there.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.border import Role, border
from batchrun.data.journal import delete_journal
from batchrun.data.kept import read_kept_parts
from batchrun.data.layout import (
    RETRY_PLAN_NAME,
    STAGED_NAME,
    SUCCESS,
    commit_path,
    retries_folder,
    retry_plan_path,
    staged_path,
)
from batchrun.data.parts import (
    CALLS_COLUMN,
    digest_of,
    part_from_json,
    part_from_object,
    part_metadata,
    part_to_json,
)
from batchrun.data.store import Store
from batchrun.data.strikes import delete_strikes
from batchrun.data.writer import PartFile
from batchrun.errors import OutputError
from batchrun.records import Completion, ErrorKind, FinishReason, Lease, Part, ToolCall
from batchrun.rows import Rows

_THREADS = 8
_BATCH_ROWS = 256
_COLUMNS = (
    "id",
    "sample",
    "completion",
    "reasoning",
    "finish_reason",
    "prompt_tokens",
    "reasoning_tokens",
    "completion_tokens",
    "thinking_budget_hit",
    "error",
    "logprobs",
    CALLS_COLUMN,
)


@dataclass(frozen=True, slots=True)
class Retry:
    """A retry under way.

    ``rows`` are those of which a sample is still to be tried again, by shard number; ``replaces``
    are the parts that they stand in.
    """

    number: int
    kinds: tuple[ErrorKind, ...]
    rows: Mapping[int, Rows]
    replaces: Mapping[int, Part] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """How many rows are to be tried again."""
        return sum(map(len, self.rows.values()))


def begin_retry(
    store: Store, run: str, parts: Mapping[int, Part], kinds: Sequence[ErrorKind], n: int
) -> Retry:
    """Plan a retry of the rows of which a sample failed with one of ``kinds``, or go on with one.

    A retry of the same kinds that was cut off goes on, with what it left in the journal. Nothing
    is written when no row failed so. Parts that were kept of another job's run stay as they are.
    Only for the holder of the run lock.
    """
    kept = read_kept_parts(store, run).parts
    parts = {number: part for number, part in parts.items() if number not in kept}
    chosen = tuple(sorted(set(kinds)))
    last, staged, recorded = _look(store, run)
    if last:
        latest = _read_plan(store, run, last)
        left = {
            number: rows
            for number, rows in latest.rows.items()
            if (number, last) not in recorded - staged and number in parts
        }
        if left and latest.kinds == chosen:
            return replace(latest, rows=left, replaces={number: parts[number] for number in left})
    rows = find_failed(store, parts.values(), chosen, n)
    if not rows:
        return Retry(0, chosen, {})
    # What is in the journal of a published shard is what it was published from.
    delete_journal(store, run, rows)
    if ErrorKind.WORKER_LOST in chosen:
        delete_strikes(store, run)
    plan = {
        "errors": [kind.value for kind in chosen],
        "rows": {str(number): rows[number].ranges for number in sorted(rows)},
    }
    path = retry_plan_path(run, last + 1)
    if not store.put_if_absent(path, json.dumps(plan, indent=1).encode(), uuid.uuid4().hex):
        raise OutputError(f"output: {store.url}/{path} was made by another retry", "try again")
    return Retry(last + 1, chosen, rows, {number: parts[number] for number in rows})


def unfinished_shards(store: Store, run: str) -> frozenset[int]:
    """The shards with rows that the newest retry has still to try: it goes on with their journals.

    A plan that is damaged holds none, as no retry can go on with it. Only reads.
    """
    last, staged, recorded = _look(store, run)
    if not last:
        return frozenset()
    try:
        planned = _read_plan(store, run, last).rows
    except OutputError:
        return frozenset()
    return frozenset(number for number in planned if (number, last) not in recorded - staged)


def find_failed(
    store: Store, parts: Iterable[Part], kinds: Sequence[ErrorKind], n: int
) -> dict[int, Rows]:
    """The rows of which a sample failed with one of ``kinds``, by shard number.

    Reads one column, and only of parts whose record counts failed rows.
    """
    wanted = _beginnings(kinds)
    with ThreadPoolExecutor(_THREADS) as pool:
        failed = [part for part in parts if part.counts.failed_rows]
        found = pool.map(lambda part: Rows.of(_failed(store, part, wanted, n)), failed)
        return {part.shard: rows for part, rows in zip(failed, found, strict=True) if rows}


def read_kept(store: Store, retry: Retry, shard: int, n: int) -> Iterator[Completion]:
    """The samples of a shard's part that the retry leaves as they are, in order; few at a time.

    Of the rows to be tried again these are the samples that did not fail so. Where the run has
    scores they have no verdict: which answer was found is not in a part, so they are to be scored
    again.
    """
    part, retried, wanted = retry.replaces[shard], retry.rows[shard], _beginnings(retry.kinds)
    with border(Role.OUTPUT, f"{store.url}/{part.name}"):
        with store.open_file(part.name) as source, pq.ParquetFile(source) as parquet:
            present = [name for name in _COLUMNS if name in parquet.schema_arrow.names]
            position = 0
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=present, use_threads=False):
                for row in batch.to_pylist():
                    ordinal = position // n
                    position += 1
                    error = row["error"]
                    if ordinal not in retried or error is None or not error.startswith(wanted):
                        yield _completion(ordinal, row)


def stage_part(
    store: Store, run: str, retry: Retry, part_file: PartFile, lease: Lease, n: int
) -> Part:
    """Put a shard's new part beside the old one; what the part will be once it is in its place.

    When another attempt was first, its part counts.
    """
    shard, number = lease.shard, retry.number
    # Not the one that is there by now: the new part is made of this one's rows.
    old = retry.replaces[shard.number]
    path = staged_path(run, shard.number, number)
    place = _record_path(run, shard.number, number)
    metadata = part_metadata(run, shard, part_file.num_rows, part_file.sha256)
    if store.put_if_absent(path, part_file.path, lease.attempt, metadata):
        new = replace(
            old,
            attempt=lease.attempt,
            size_bytes=part_file.size_bytes,
            sha256=part_file.sha256,
            num_rows=part_file.num_rows,
            counts=part_file.counts,
        )
    elif store.info(place) is not None:  # the part may be in its place by now, and not here
        return _read_record(store, run, shard.number, number)[1]
    else:
        new = replace(part_from_object(store, run, shard, path, n), name=old.name)
    record = {name: json.loads(part_to_json(part)) for name, part in (("old", old), ("new", new))}
    store.put_if_absent(place, json.dumps(record, indent=1).encode(), uuid.uuid4().hex)
    return _read_record(store, run, shard.number, number)[1]


def apply_staged(
    store: Store,
    run: str,
    shard: int,
    number: int,
    confirm: Callable[[], None] = lambda: None,
) -> Part:
    """Put a staged part in its place; only for the holder of the run lock. May be repeated.

    ``confirm`` raises when the lock is lost; it is asked before and between, as a copy may take
    long, and who took over may have replaced the part once more meanwhile.

    Raises OutputError when the part there is neither the one that it replaces nor itself.
    """
    confirm()
    old, new = _read_record(store, run, shard, number)
    staged, current = staged_path(run, shard, number), _read_commit(store, run, shard)
    if current.sha256 == old.sha256 != new.sha256:
        # It counts rows that will not be there any more.
        store.delete([SUCCESS])
        store.copy(staged, new.name)
        confirm()
        store.put(commit_path(run, shard), part_to_json(new))
    elif current.sha256 != new.sha256:
        raise OutputError(
            f"output: {store.url}/{new.name} is not the part that retry {number} began with",
            f"remove {staged} to keep the part as it is",
        )
    store.delete([staged])
    return new


def recover(store: Store, run: str, confirm: Callable[[], None] = lambda: None) -> int:
    """Finish what retries left half done; how many parts that were. For whoever opens the run;
    ``confirm`` as for :func:`apply_staged`."""
    last, staged, recorded = _look(store, run)
    done = {k for k in staged & recorded if k[1] == last or _is_copied(store, run, *k)}
    # A worker that was given up may come late, when the next retry is under way.
    store.delete([staged_path(run, *key) for key in staged - done if key[1] < last])
    for shard, number in sorted(done):
        apply_staged(store, run, shard, number, confirm)
    return len(done)


def _is_copied(store: Store, run: str, shard: int, number: int) -> bool:
    """Whether a staged part stands in its place, but not in the commit record yet."""
    old, new = _read_record(store, run, shard, number)
    current, found = _read_commit(store, run, shard), store.info(new.name)
    if current.sha256 != old.sha256 or found is None or found.size_bytes != new.size_bytes:
        return False
    with store.open_file(new.name) as source:
        return digest_of(source) == (new.size_bytes, new.sha256)


def is_cut_off(store: Store, run: str, part: Part, sha256: str) -> bool:
    """Whether these bytes stand in the part's place because a retry was cut off there."""
    _, staged, recorded = _look(store, run)
    return any(
        _read_record(store, run, *key)[1].sha256 == sha256
        for key in staged & recorded
        if key[0] == part.shard
    )


def _beginnings(kinds: Iterable[ErrorKind]) -> tuple[str, ...]:
    """How the column ``error`` begins for these kinds."""
    return tuple(f"{kind.value}: " for kind in kinds)


def _completion(ordinal: int, row: Mapping[str, Any]) -> Completion:
    logprobs, calls = row.get("logprobs"), row.get(CALLS_COLUMN)
    own = {name: row[name] for name in _COLUMNS if name in row}
    own["finish_reason"] = FinishReason(row["finish_reason"])
    own["logprobs"] = None if logprobs is None else tuple(logprobs)
    own[CALLS_COLUMN] = None if calls is None else tuple(ToolCall(**call) for call in calls)
    return Completion(ordinal=ordinal, **own)


def _look(store: Store, run: str) -> tuple[int, set[tuple[int, int]], set[tuple[int, int]]]:
    """The number of the last retry, and (shard, number) of staged parts and of their records."""
    last = 0
    staged: set[tuple[int, int]] = set()
    recorded: set[tuple[int, int]] = set()
    for item in store.list(retries_folder(run)):
        name = item.path.rpartition("/")[2]
        if plan := RETRY_PLAN_NAME.fullmatch(name):
            last = max(last, int(plan[1]))
        elif found := STAGED_NAME.fullmatch(name):
            (staged if found[3] == "parquet" else recorded).add((int(found[1]), int(found[2])))
    return last, staged, recorded


def _read_plan(store: Store, run: str, number: int) -> Retry:
    path = retry_plan_path(run, number)
    try:
        raw = json.loads(store.read(path) or b"null")
        rows = {int(shard): Rows.of_ranges(ranges) for shard, ranges in raw["rows"].items()}
        return Retry(number, tuple(ErrorKind(kind) for kind in raw["errors"]), rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(f"output: {store.url}/{path} is damaged ({error!r})") from error


def _read_commit(store: Store, run: str, shard: int) -> Part:
    """The part that is committed for a shard."""
    path = commit_path(run, shard)
    try:
        return part_from_json(store.read(path) or b"null")
    except ValueError as error:
        raise OutputError(f"output: {store.url}/{path} is damaged ({error})") from error


def _record_path(run: str, shard: int, number: int) -> str:
    return staged_path(run, shard, number).removesuffix(".parquet") + ".json"


def _read_record(store: Store, run: str, shard: int, number: int) -> tuple[Part, Part]:
    """The part that a staged one replaces, and what it will be in its place."""
    path = _record_path(run, shard, number)
    try:
        raw = json.loads(store.read(path) or b"null")
        old, new = (part_from_json(json.dumps(raw[name]).encode()) for name in ("old", "new"))
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(f"output: {store.url}/{path} is damaged ({error!r})") from error
    return old, new


def _failed(store: Store, part: Part, wanted: tuple[str, ...], n: int) -> Iterator[int]:
    """The ordinals of rows of which a sample has one of these errors."""
    try:
        with store.open_file(part.name) as source, pq.ParquetFile(source) as parquet:
            position = 0
            for batch in parquet.iter_batches(columns=["error"], use_threads=False):
                for text in batch.column(0).to_pylist():
                    if text is not None and text.startswith(wanted):
                        yield position // n
                    position += 1
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"output: {store.url}/{part.name} is damaged ({error})", "see `batchrun verify`"
        ) from error
