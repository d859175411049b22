"""A run's bookkeeping beside its parts. What is true of a run is what object storage lists."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from batchrun.data.footers import InputFile
from batchrun.data.layout import (
    FOLDER,
    MANIFEST_NAME,
    PART_NAME,
    SUCCESS,
    commit_path,
    failed_path,
    part_name,
    run_folder,
    run_id,
    traces_path,
)
from batchrun.data.parts import check_part, part_from_json, part_from_object, part_to_json
from batchrun.data.plan import PlanRule, append_plan, change_plan, count_rows, read_plan
from batchrun.data.schema import InputSchema
from batchrun.data.store import Store
from batchrun.data.writer import PartFile
from batchrun.errors import BatchrunError, OutputError, ShardError
from batchrun.records import Counts, Lease, Part, Shard

_RECORD_THREADS = 16
_WAYS_ON = "choose another output, or run `batchrun discard OUTPUT` first"


@dataclass(frozen=True, slots=True)
class Progress:
    """What a driver says of its run every few seconds, for ``batchrun status``.

    ``counts`` includes rows of shards that are not published yet. Rates are per second.
    """

    epoch: int
    total_rows: int
    counts: Counts
    workers: int = 0
    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0
    eta_s: float | None = None
    updated_at: float = field(default_factory=time.time)


class RunDirectory:
    """The bookkeeping of one run in one output. Holds no state: any process may make its own."""

    def __init__(self, store: Store, run: str, *, n: int = 1) -> None:
        self.store = store
        self.run = run
        self._n = n

    def publish(self, part_file: PartFile, lease: Lease) -> Part:
        """Put a finished part in its place, once, and record the commit.

        When another attempt was first, its part stands and is returned; nothing is deleted.
        Raises :class:`~batchrun.errors.ShardError` when a foreign object has the part's name.
        """
        shard = lease.shard
        name = part_name(self.run, shard)
        metadata = {
            "batchrun-run": self.run,
            "batchrun-shard": str(shard.number),
            "batchrun-rows": str(part_file.num_rows),
            "batchrun-sha256": part_file.sha256,
        }
        if part_file.traces is not None:
            # First, so that whoever finds the part finds them too.
            path = traces_path(self.run, shard)
            self.store.put_if_absent(path, part_file.traces, lease.attempt)
        if self.store.put_if_absent(name, part_file.path, lease.attempt, metadata):
            part = Part(
                shard=shard.number,
                name=name,
                attempt=lease.attempt,
                size_bytes=part_file.size_bytes,
                sha256=part_file.sha256,
                num_rows=part_file.num_rows,
                counts=part_file.counts,
            )
        else:
            part = part_from_object(self.store, self.run, shard, name, self._n)
        return self._record(part)

    def committed(
        self, shards: Sequence[Shard], known: Mapping[int, Part] | None = None
    ) -> dict[int, Part]:
        """The published parts by shard number, by listing the output.

        ``known`` parts are not read again. A part without a commit record (its worker died in
        between) is read to make one. Raises OutputError for a part that is missing or altered.
        """
        sizes = {
            item.path: item.size_bytes
            for item in self.store.list(recursive=False)
            if PART_NAME.fullmatch(item.path)
        }
        recorded = {
            int(item.path.rpartition("/")[2].removesuffix(".json"))
            for item in self.store.list(f"{run_folder(self.run)}/parts")
        }
        found = dict(known or {})

        def load(shard: Shard) -> Part | None:
            if shard.number in recorded:
                return self._read_record(shard)
            name = part_name(self.run, shard)
            if name not in sizes:
                return None
            return self._record(part_from_object(self.store, self.run, shard, name, self._n))

        with ThreadPoolExecutor(_RECORD_THREADS) as pool:
            for part in pool.map(load, [item for item in shards if item.number not in found]):
                if part is not None:
                    found[part.shard] = part
        for part in found.values():
            check_part(self.store, part, sizes)
        return found

    def recorded(self, shards: Sequence[Shard]) -> dict[int, Part]:
        """The published parts by their commit records alone; only reads."""
        present = {
            int(item.path.rpartition("/")[2].removesuffix(".json"))
            for item in self.store.list(f"{run_folder(self.run)}/parts")
        }
        with ThreadPoolExecutor(_RECORD_THREADS) as pool:
            found = pool.map(
                self._read_record, [shard for shard in shards if shard.number in present]
            )
            return {part.shard: part for part in found}

    def mark_failed(self, shard: Shard, error: BatchrunError | str) -> None:
        """Record why a shard could not be run; the next submit tries it again."""
        record = {"shard": shard.number, "path": shard.path, "error": str(error)}
        self.store.put(failed_path(self.run, shard.number), json.dumps(record).encode())

    def failed(self) -> dict[int, str]:
        """Shard number -> why it could not be run in the latest submit."""
        found: dict[int, str] = {}
        for item in self.store.list(f"{run_folder(self.run)}/failed"):
            data = self.store.read(item.path)
            if data is not None:
                record = json.loads(data)
                found[int(record["shard"])] = str(record["error"])
        return found

    def clear_failed(self) -> None:
        """Forget the failures of earlier submits."""
        paths = [item.path for item in self.store.list(f"{run_folder(self.run)}/failed")]
        if paths:
            self.store.delete(paths)

    def write_progress(self, progress: Progress) -> None:
        """Replace what ``batchrun status`` shows."""
        data = json.dumps(asdict(progress), indent=1).encode()
        self.store.put(f"{run_folder(self.run)}/progress.json", data)

    def read_progress(self) -> Progress | None:
        """The latest progress of a driver, or None."""
        data = self.store.read(f"{run_folder(self.run)}/progress.json")
        if data is None:
            return None
        raw = json.loads(data)
        return Progress(**{**raw, "counts": Counts.from_json(raw["counts"])})

    def finish(
        self,
        shards: Sequence[Shard],
        failed: Mapping[int, str],
        *,
        success: bool,
        known: Mapping[int, Part] | None = None,
    ) -> Counts:
        """Write the manifest, and ``_SUCCESS`` if all went well; the sums over all parts.

        Truth is the listing. Raises when a shard that did not fail has no part. May be called
        again: equal content is not written twice.
        """
        parts = self.committed(shards, known)
        missing = [item.name for item in shards if item.number not in {*parts, *failed}]
        if missing or (success and failed):
            raise BatchrunError(
                f"the run cannot end: {len(missing)} shards have no part"
                + (f", the first is {missing[0]}" if missing else ""),
                "submit again to run them",
            )
        counts = sum((part.counts for part in parts.values()), Counts())
        manifest = {
            "run_id": self.run,
            "shards": len(shards),
            "counts": asdict(counts),
            "parts": [asdict(parts[number]) for number in sorted(parts)],
            "failed": {str(number): failed[number] for number in sorted(failed)},
        }
        name = self._write_manifest(manifest)
        if success and self.store.info(SUCCESS) is None:
            summary: dict[str, object] = {
                "run_id": self.run,
                "manifest": f"{run_folder(self.run)}/{name}",
                "parts": len(parts),
                "samples": sum(part.num_rows for part in parts.values()),
                **success_counts(counts),
            }
            self.store.put(SUCCESS, json.dumps(summary, indent=1).encode())
        return counts

    def _write_manifest(self, manifest: Mapping[str, object]) -> str:
        """Save the manifest under the next number, unless the newest one says the same."""
        data = json.dumps(manifest, indent=1).encode()
        while True:
            names = [
                item.path.rpartition("/")[2]
                for item in self.store.list(run_folder(self.run), recursive=False)
            ]
            numbers = [int(found[1]) for name in names if (found := MANIFEST_NAME.fullmatch(name))]
            last = max(numbers, default=0)
            newest = f"manifest-{last:04d}.json"
            if last and self.store.read(f"{run_folder(self.run)}/{newest}") == data:
                return newest
            name = f"manifest-{last + 1:04d}.json"
            if self.store.put_if_absent(f"{run_folder(self.run)}/{name}", data, uuid.uuid4().hex):
                return name

    def _record(self, part: Part) -> Part:
        """The commit record of the part's shard, made now if there is none."""
        path = commit_path(self.run, part.shard)
        self.store.put_if_absent(path, part_to_json(part), part.attempt or uuid.uuid4().hex)
        data = self.store.read(path)
        if data is None:
            raise OutputError(f"output: {self.store.url}/{path} vanished", "submit again to resume")
        try:
            recorded = part_from_json(data)
        except ValueError as error:
            raise OutputError(f"output: {self.store.url}/{path} is damaged ({error})") from error
        if recorded.sha256 != part.sha256:
            raise ShardError(
                f"{self.store.url}/{part.name} is not the part that was committed",
                "put the committed part back, or choose another output",
            )
        return recorded

    def _read_record(self, shard: Shard) -> Part:
        path = commit_path(self.run, shard.number)
        data = self.store.read(path)
        try:
            return part_from_json(data or b"null")
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"output: {self.store.url}/{path} is damaged ({error})", _WAYS_ON
            ) from error


@dataclass(frozen=True, slots=True)
class OpenedRun:
    """A run ready to go on: all its shards, the types of its columns, and what is done."""

    directory: RunDirectory
    shards: tuple[Shard, ...]
    schema: InputSchema
    parts: Mapping[int, Part]

    @property
    def total_rows(self) -> int:
        """Rows of the whole input."""
        return count_rows(self.shards)


def check_output(store: Store, semantic: Mapping[str, object]) -> None:
    """Raise :class:`~batchrun.errors.OutputError` if the output holds anything but this run.

    Only reads. Says what changed in the job, and the ways on.
    """
    run = run_id(semantic)
    other = find_run(store)
    if other is not None and other != run:
        changed = _differences(read_semantic(store, other), semantic)
        raise OutputError(
            f"output: {store.url} holds the run of another job; what changed: "
            + ("; ".join(changed[:12]) or "unknown"),
            _WAYS_ON,
        )
    if other is None:
        for item in store.list(recursive=False):
            if item.path == SUCCESS or item.path.endswith(".parquet"):
                raise OutputError(
                    f"output: {store.url} already holds {item.path}, which no run of batchrun "
                    "wrote",
                    "choose an empty folder",
                )


def success_counts(counts: Counts) -> dict[str, object]:
    """The counts as ``_SUCCESS`` holds them: with a report of the scores where there are some."""
    found: dict[str, object] = asdict(counts)
    del found["scores"]
    if counts.scores is not None:
        found["evaluation"] = counts.scores.report()
    return found


def find_run(store: Store) -> str | None:
    """The id of the run in this output, or None."""
    for name in store.folders(FOLDER):
        if store.info(f"{run_folder(name)}/job.json") is not None:
            return name
    return None


def require_run(store: Store) -> str:
    """The id of the run in this output. Raises OutputError when there is none."""
    run = find_run(store)
    if run is None:
        raise OutputError(
            f"output: {store.url} holds no run of batchrun", "check the path, or submit a job"
        )
    return run


def open_run(
    store: Store,
    semantic: Mapping[str, object],
    resolved_job: Mapping[str, object],
    files: Sequence[InputFile],
    rule: PlanRule,
) -> OpenedRun:
    """Begin or resume the run of a job in ``store``; only while its lock is held.

    Raises OutputError when the output holds another job's run or foreign files, InputError when
    a finished file changed or vanished or a new one does not fit. ``_SUCCESS`` goes before
    anything new is planned.
    """
    check_output(store, semantic)
    store.sweep()
    directory = RunDirectory(store, run_id(semantic), n=rule.n)
    token = uuid.uuid4().hex
    # Looked at first: a plan that cannot be made leaves no trace.
    plan = read_plan(store, directory.run, rule.columns)
    job = {"run_id": directory.run, "semantic": semantic, "job": resolved_job}
    while True:
        shards = tuple(plan.shards.values())
        parts = directory.committed(shards) if shards else {}
        change = change_plan(plan, files, rule, parts)
        if plan.num_files and not change.added and not change.dropped:
            break
        store.put_if_absent(
            f"{run_folder(directory.run)}/job.json", json.dumps(job, indent=1).encode(), token
        )
        if change.added:
            store.delete([SUCCESS])
        if append_plan(store, directory.run, plan, change, token):
            break
        plan = read_plan(store, directory.run, rule.columns)
    directory.clear_failed()
    _refuse_strangers(store, directory.run, (*change.kept, *change.added))
    return OpenedRun(directory, (*change.kept, *change.added), change.schema, parts)


def _refuse_strangers(store: Store, run: str, shards: Sequence[Shard]) -> None:
    """Raise for a Parquet file in the output that is no part of this run: readers would see it."""
    names = {part_name(run, shard) for shard in shards}
    for item in store.list(recursive=False):
        if item.path.endswith(".parquet") and item.path not in names:
            raise OutputError(
                f"output: {store.url} holds {item.path}, which is no part of this run",
                "move it away",
            )


def read_semantic(store: Store, run: str) -> Mapping[str, object]:
    """What determines the content of a run, as it was recorded; empty where that is damaged."""
    data = store.read(f"{run_folder(run)}/job.json")
    try:
        semantic = json.loads(data or b"{}").get("semantic", {})
    except (ValueError, AttributeError):
        return {}
    return semantic if isinstance(semantic, dict) else {}


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """``key: old -> new`` for every leaf that differs, in key order."""
    before, after = _flat(old), _flat(new)
    absent = "(not set)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in sorted({*before, *after})
        if before.get(key, absent) != after.get(key, absent)
    ]


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return found
    text = json.dumps(value, ensure_ascii=False)
    return {prefix: text if len(text) <= 80 else text[:77] + "..."}
