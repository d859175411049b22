"""The plan of a run: which shards there are. Saved once, only ever added to.

Each ``plan-<n>.parquet`` is create-only. A shard keeps its first number for ever, so a resumed
run never cuts its input anew.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.footers import InputFile
from batchrun.data.layout import PLAN_NAME, run_folder
from batchrun.data.schema import InputColumns, InputSchema
from batchrun.data.shards import plan_shards
from batchrun.data.store import Store
from batchrun.errors import InputError, OutputError
from batchrun.records import Shard

_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("path", pa.string()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("fingerprint", pa.string()),
        ("row_groups", pa.list_(pa.int32())),
        ("first_row", pa.int64()),
        ("num_rows", pa.int64()),
    ]
)
_TYPES_KEY = b"batchrun.input_schema"
_DROPPED_KEY = b"batchrun.dropped"
_CHANGED_WAYS = (
    "put the input back as it was, choose another output, run `batchrun discard OUTPUT` first, or "
    "submit with `--keep-finished` to keep the parts as they are"
)


@dataclass(frozen=True, slots=True)
class PlanRule:
    """What of a job decides how its input is cut."""

    columns: InputColumns
    max_tokens: int
    n: int = 1
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards of a run, by number, and the column types with which it began."""

    shards: Mapping[int, Shard] = field(default_factory=dict)
    schema: InputSchema | None = None
    num_files: int = 0
    next_number: int = 0


@dataclass(frozen=True, slots=True)
class PlanChange:
    """What a new look at the input adds to a plan: shards, and numbers that are void.

    ``kept`` are the plan's other shards, with the place where their files are now.
    """

    added: tuple[Shard, ...]
    dropped: tuple[int, ...]
    kept: tuple[Shard, ...]
    schema: InputSchema


def read_plan(store: Store, run: str, columns: InputColumns) -> Plan:
    """The plan of a run so far; an empty one when there is none."""
    shards: dict[int, Shard] = {}
    schema: InputSchema | None = None
    next_number = 0
    names = sorted(
        item.path
        for item in store.list(run_folder(run), recursive=False)
        if PLAN_NAME.fullmatch(item.path.rpartition("/")[2])
    )
    for name in names:
        data = store.read(name)
        if data is None:
            raise OutputError(f"output: {store.url}/{name} vanished", "submit again")
        table = _parse(data, f"{store.url}/{name}")
        metadata = table.schema.metadata
        for number in json.loads(metadata[_DROPPED_KEY]):
            shards.pop(number, None)
        for item in table.to_pylist():
            shard = Shard(**{**item, "row_groups": tuple(item["row_groups"])})
            shards[shard.number] = shard
            next_number = max(next_number, shard.number + 1)
        if schema is None:
            schema = InputSchema.from_bytes(metadata[_TYPES_KEY], columns)
    return Plan(shards, schema, len(names), next_number)


def change_plan(
    plan: Plan,
    files: Sequence[InputFile],
    rule: PlanRule,
    parts: Container[int],
    *,
    keep_finished: bool = False,
) -> PlanChange:
    """What the input as it is now makes of the plan, whose shards ``parts`` are finished. Pure.

    Raises :class:`~batchrun.errors.InputError` naming every file with a finished shard that
    changed or vanished; with ``keep_finished`` a file all of whose shards are finished stays as it
    was. Unfinished shards of other such files are dropped; new files are added.
    """
    by_path: dict[str, list[Shard]] = {}
    for shard in plan.shards.values():
        by_path.setdefault(shard.path, []).append(shard)
    paths_by_uri = {shard.uri: shard.path for shard in plan.shards.values()}
    kept: list[Shard] = []
    dropped: list[int] = []
    new: list[InputFile] = []
    wrong: list[str] = []
    for file in files:
        path = file.path if file.path in by_path else paths_by_uri.get(file.uri, file.path)
        planned = by_path.pop(path, None)
        if planned is None:
            new.append(file)
        elif all(shard.fingerprint == file.fingerprint for shard in planned):
            kept.extend(replace(shard, uri=file.uri) for shard in planned)
        elif keep_finished and all(shard.number in parts for shard in planned):
            kept.extend(planned)
        elif any(shard.number in parts for shard in planned):
            wrong.append(f"{file.uri} changed after it was finished")
        else:
            dropped.extend(shard.number for shard in planned)
            new.append(file)
    for path, planned in by_path.items():
        if keep_finished and all(shard.number in parts for shard in planned):
            kept.extend(planned)
        elif any(shard.number in parts for shard in planned):
            wrong.append(f"{path} was finished and is no longer in the input")
        else:
            dropped.extend(shard.number for shard in planned)
    if wrong:
        raise InputError("input: " + "; ".join(wrong[:10]), _CHANGED_WAYS)
    return _with_new(plan, new, rule, kept, dropped, files)


def moved(plan: Plan, files: Iterable[InputFile]) -> tuple[Shard, ...]:
    """The shards of a plan, with the place where their files are now, as far as they are there."""
    places = {file.path: file.uri for file in files}
    return tuple(
        replace(shard, uri=places.get(shard.path, shard.uri)) for shard in plan.shards.values()
    )


def _with_new(
    plan: Plan,
    new: Sequence[InputFile],
    rule: PlanRule,
    kept: list[Shard],
    dropped: list[int],
    files: Sequence[InputFile],
) -> PlanChange:
    limit = rule.limit
    if limit is not None:
        limit -= sum(shard.num_rows for shard in kept)
    added = plan_shards(
        new,
        carried=rule.columns.carried,
        max_tokens=rule.max_tokens,
        n=rule.n,
        limit=limit,
        first_number=plan.next_number,
    )
    kept.sort(key=lambda shard: shard.number)
    schema = InputSchema.of(files, rule.columns, plan.schema)
    return PlanChange(tuple(added), tuple(dropped), tuple(kept), schema)


def append_plan(store: Store, run: str, plan: Plan, change: PlanChange, token: str) -> bool:
    """Save what is new as the plan's next file; False when another driver was first."""
    rows = [
        {name: getattr(shard, name) for name in _SCHEMA.names if name != "row_groups"}
        | {"row_groups": list(shard.row_groups)}
        for shard in change.added
    ]
    schema = (plan.schema or change.schema).to_bytes()
    metadata = {_TYPES_KEY: schema, _DROPPED_KEY: json.dumps(list(change.dropped)).encode()}
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(metadata))
    pq.write_table(table, sink, compression="zstd")
    name = f"{run_folder(run)}/plan-{plan.num_files + 1:04d}"
    if not store.put_if_absent(f"{name}.parquet", sink.getvalue(), token):
        return False
    summary = {
        "plan": f"plan-{plan.num_files + 1:04d}.parquet",
        "sha256": hashlib.sha256(sink.getvalue()).hexdigest(),
        "shards": len(change.added),
        "rows": count_rows(change.added),
        "dropped_shards": len(change.dropped),
    }
    store.put_if_absent(f"{name}.json", json.dumps(summary, indent=1).encode(), token)
    return True


def count_rows(shards: Iterable[Shard]) -> int:
    """Rows of all the shards."""
    return sum(shard.num_rows for shard in shards)


def _parse(data: bytes, name: str) -> pa.Table:
    try:
        # Without Arrow's threads: one that still lets go of a Python object while the process
        # ends would abort it.
        with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as parquet:
            table = parquet.read(use_threads=False)
        if not {_TYPES_KEY, _DROPPED_KEY} <= set(table.schema.metadata or {}):
            raise ValueError("its metadata is missing")
        return table
    except (pa.ArrowException, ValueError, OSError) as error:
        raise OutputError(
            f"output: {name} is not a plan of batchrun ({error})", "choose another output"
        ) from error
