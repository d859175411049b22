"""Whether an output holds exactly what its run was planned to write, from storage alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.jobrecord import require_run
from batchrun.data.kept import KeptParts, read_kept_parts
from batchrun.data.layout import FOLDER, SUCCESS, journal_folder, part_name, run_folder
from batchrun.data.parts import RUN_KEY, digest_of, part_from_json
from batchrun.data.plan import count_rows, read_plan
from batchrun.data.retry import is_cut_off
from batchrun.data.run import RunDirectory, success_counts
from batchrun.data.schema import InputColumns
from batchrun.data.store import Store
from batchrun.errors import BatchrunError, OutputError
from batchrun.records import Counts, Part, Shard

_THREADS = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was looked at, and every thing that is not as it should be. ``kept`` says how many of
    the parts are of other runs, by run, where a changed job took them over."""

    run_id: str
    num_shards: int
    num_rows: int
    num_parts: int
    counts: Counts
    problems: tuple[str, ...]
    kept: Mapping[str, int] = field(default_factory=dict)


def verify_run(store: Store) -> Verdict:
    """Read every part of the run in ``store`` and hold it against the plan and the records.

    Every planned row must stand in exactly one published part, once a sample and in input order;
    every part must have the size, the checksum and the rows that its commit record and the
    manifest say; nothing else that a reader would take for output may lie there. Only reads.

    :raises OutputError: there is no run, or its bookkeeping cannot be read.
    """
    run = require_run(store)
    shards = tuple(read_plan(store, run, InputColumns()).shards.values())
    directory = RunDirectory(store, run)
    parts = directory.recorded(shards)
    kept = read_kept_parts(store, run)
    rules = {name: _Rule.read(store, name) for name in {run, *kept.runs.values()}}
    journals = set(store.folders(journal_folder(run)))
    problems = list(_missing(shards, parts, directory.failed(), journals))

    def check(shard: Shard) -> list[str]:
        owner = kept.runs.get(shard.number, run)
        return list(_check_part(store, owner, shard, parts[shard.number], rules[owner]))

    with ThreadPoolExecutor(_THREADS) as pool:
        committed = [shard for shard in shards if shard.number in parts]
        for found in pool.map(check, committed):
            problems += found
    problems += _orphans(store, run, shards, journals, kept)
    counts = sum((part.counts for part in parts.values()), Counts())
    owners = {number: kept.runs.get(number, run) for number in parts}
    problems += _check_success(store, parts, owners, counts, complete=len(parts) == len(shards))
    return Verdict(
        run,
        len(shards),
        count_rows(shards),
        len(parts),
        counts,
        tuple(problems),
        kept.num_parts,
    )


@dataclass(frozen=True, slots=True)
class _Rule:
    """What of the job says how rows look: samples a row, and whether ids are the default ones."""

    n: int
    default_ids: bool

    @classmethod
    def read(cls, store: Store, run: str) -> _Rule:
        path = f"{run_folder(run)}/job.json"
        try:
            semantic = json.loads(store.read(path) or b"null")["semantic"]
            return cls(int(semantic["generation"]["n"]), semantic["input"]["id_column"] is None)
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"output: {store.url}/{path} is damaged ({error!r})") from error


def _missing(
    shards: Sequence[Shard],
    parts: Mapping[int, Part],
    failed: Mapping[int, str],
    journals: Set[str],
) -> Iterator[str]:
    for shard in shards:
        if shard.number not in parts:
            why = failed.get(shard.number)
            text = f"shard {shard.name}: no part" + (f"; it failed: {why}" if why else "")
            is_begun = f"{shard.number:06d}" in journals
            yield text + ("; some of its rows wait in the journal" if is_begun else "")


def _check_part(store: Store, run: str, shard: Shard, part: Part, rule: _Rule) -> Iterator[str]:
    """What is wrong with one published part."""
    if part.name != part_name(run, shard):
        yield f"shard {shard.name}: its record names {part.name}, not {part_name(run, shard)}"
        return
    try:
        with store.open_file(part.name) as source:
            size, sha256 = digest_of(source)
            if (size, sha256) != (part.size_bytes, part.sha256):
                if is_cut_off(store, run, part, sha256):
                    yield f"{part.name}: a retry was cut off; submit the job again to finish it"
                    return
                yield (
                    f"{part.name}: its bytes are not those that were committed "
                    f"({size} bytes, {part.size_bytes} expected)"
                )
                return
            source.seek(0)
            with pq.ParquetFile(source) as parquet:
                yield from _check_rows(parquet, run, shard, part, rule)
    except (BatchrunError, pa.ArrowException, OSError) as error:
        yield f"{part.name}: cannot be read: {error}"


def _check_rows(
    parquet: pq.ParquetFile, run: str, shard: Shard, part: Part, rule: _Rule
) -> Iterator[str]:
    """Hold a part's rows against the shard that it answers."""
    if (parquet.schema_arrow.metadata or {}).get(RUN_KEY.encode()) != run.encode():
        yield f"{part.name}: names another run"
    num_rows, expected = parquet.metadata.num_rows, shard.num_rows * rule.n
    if not num_rows == part.num_rows == expected:
        yield f"{part.name}: has {num_rows} rows, {expected} expected"
        return
    position = 0
    for batch in parquet.iter_batches(columns=["id", "sample"], use_threads=False):
        ids, samples = batch.column(0).to_pylist(), batch.column(1).to_pylist()
        for row_id, sample in zip(ids, samples, strict=True):
            ordinal, wanted = divmod(position, rule.n)
            own = f"{shard.path}:{shard.first_row + ordinal}" if rule.default_ids else row_id
            if sample != wanted or row_id is None or row_id != own:
                yield f"{part.name}: row {position} is ({row_id}, {sample}), not ({own}, {wanted})"
                return
            position += 1


def _orphans(
    store: Store, run: str, shards: Sequence[Shard], journals: Set[str], kept: KeptParts
) -> Iterator[str]:
    """Objects that a reader would take for output, or that belong to no planned shard.

    The journal of a shard that has its part is none: it goes when it is convenient.
    """
    names = {part_name(kept.runs.get(shard.number, run), shard) for shard in shards}
    for item in store.list(recursive=False):
        if item.path.endswith(".parquet") and item.path not in names:
            yield f"{item.path}: is no part of this run"
    numbers = {shard.number for shard in shards}
    for item in store.list(f"{run_folder(run)}/parts"):
        number = item.path.rpartition("/")[2].removesuffix(".json")
        if not number.isdigit() or int(number) not in numbers:
            yield f"{item.path}: is the record of no planned shard"
    for name in sorted(journals):
        if not name.isdecimal() or int(name) not in numbers:
            yield f"{journal_folder(run)}/{name}: is the journal of no planned shard"
    for folder in store.folders(FOLDER):
        # Without the job's record it is what a submit left that ended before it was one.
        is_run = store.info(f"{run_folder(folder)}/job.json") is not None
        if folder != run and folder not in kept.earlier and is_run:
            yield f"{FOLDER}/{folder}: is the bookkeeping of another run"


def _check_success(
    store: Store,
    parts: Mapping[int, Part],
    owners: Mapping[int, str],
    counts: Counts,
    *,
    complete: bool,
) -> Iterator[str]:
    """``_SUCCESS`` may only stand beside a whole output, and must say what is there."""
    data = store.read(SUCCESS)
    if data is None:
        return
    if not complete:
        yield f"{SUCCESS}: is there although shards have no part"
    expected = json.loads(json.dumps(success_counts(counts)))
    try:
        said = json.loads(data)
        manifest = json.loads(store.read(said["manifest"]) or b"null")
        listed = [
            (item.pop("run", manifest["run_id"]), part_from_json(json.dumps(item).encode()))
            for item in manifest["parts"]
        ]
        told = {key: said.get(key, 0) for key in expected}  # versions before counted less
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield f"{SUCCESS}: it, or the manifest that it names, is damaged ({error!r})"
        return
    if told != expected:
        yield f"{SUCCESS}: its counts are not those of the parts"
    if listed != [(owners[number], parts[number]) for number in sorted(parts)]:
        yield f"{said['manifest']}: does not list the parts as they were committed"
