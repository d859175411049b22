"""A run's bookkeeping beside its parts. What is true of a run is what object storage lists."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from batchrun.data.footers import InputFile
from batchrun.data.journal import delete_journal
from batchrun.data.kept import check_columns, keep_parts, newest_run, read_kept_parts
from batchrun.data.layout import (
    MANIFEST_NAME,
    PART_NAME,
    SUCCESS,
    commit_path,
    epoch_path,
    failed_path,
    part_name,
    run_folder,
    run_id,
    traces_path,
)
from batchrun.data.parts import (
    check_part,
    part_from_json,
    part_from_object,
    part_metadata,
    part_to_json,
)
from batchrun.data.plan import (
    Plan,
    PlanChange,
    PlanRule,
    append_plan,
    change_plan,
    count_rows,
    moved,
    read_plan,
)
from batchrun.data.retry import Retry, begin_retry, recover, unfinished_shards
from batchrun.data.schema import InputSchema
from batchrun.data.store import Store
from batchrun.data.writer import PartFile, PartFormat
from batchrun.errors import (
    BatchrunError,
    OutputError,
    OutputHeldError,
    ShardError,
    StorageError,
)
from batchrun.records import Counts, ErrorKind, Lease, Part, Shard

_RECORD_THREADS = 16
_WAYS_ON = "choose another output, or run `batchrun discard OUTPUT` first"
_CHANGED_JOB_WAYS = (
    "choose another output, run `batchrun discard OUTPUT` first, or submit with `--keep-finished`: "
    "then finished parts stay and the rest runs with the new job"
)


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

    def check_stands(self, epoch: int) -> None:
        """Raise StorageError when the run was discarded since the driver of ``epoch`` began it.

        For a worker that publishes, just before it does: one that nobody could end (its machine was
        out of reach) leaves no part in an output that others took for empty. What it has sent
        already when the run is discarded may still arrive: a part under a name of the old run,
        which ``verify`` tells of.
        """
        if self.store.info(epoch_path(self.run, epoch)) is None:
            raise StorageError(
                f"output: the run of this worker is no longer in {self.store.url}: it was "
                "discarded, or deleted by hand",
                "submit again to begin anew",
            )

    def publish(self, part_file: PartFile, lease: Lease) -> Part:
        """Put a finished part in its place, once, and record the commit.

        When another attempt was first, its part stands and is returned; nothing is deleted.
        Raises :class:`~batchrun.errors.ShardError` when a foreign object has the part's name.
        """
        shard = lease.shard
        name = part_name(self.run, shard)
        metadata = part_metadata(self.run, shard, part_file.num_rows, part_file.sha256)
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
        self,
        shards: Sequence[Shard],
        known: Mapping[int, Part] | None = None,
        failed: Container[int] = (),
    ) -> dict[int, Part]:
        """The published parts by shard number, by listing the output.

        ``known`` parts are not read again. A part without a commit record (its worker died in
        between) is read to make one. Raises OutputError for a part that is missing or altered, and
        ShardError for an object in a part's place that is none, unless its shard is ``failed``.
        """
        sizes = {
            item.path: item.size_bytes
            for item in self.store.list(recursive=False)
            if PART_NAME.fullmatch(item.path)
        }
        recorded = self.recorded_numbers()
        numbers = {shard.number for shard in shards}
        kept = read_kept_parts(self.store, self.run).parts
        found = {number: part for number, part in kept.items() if number in numbers}
        found |= known or {}

        def load(shard: Shard) -> Part | None:
            if shard.number in recorded:
                return self._read_record(shard)
            name = part_name(self.run, shard)
            if name not in sizes:
                return None
            try:
                return self._record(part_from_object(self.store, self.run, shard, name, self._n))
            except ShardError:
                if shard.number in failed:
                    return None
                raise

        with ThreadPoolExecutor(_RECORD_THREADS) as pool:
            for part in pool.map(load, [item for item in shards if item.number not in found]):
                if part is not None:
                    found[part.shard] = part
        for part in found.values():
            check_part(self.store, part, sizes)
        return found

    def recorded_numbers(self) -> set[int]:
        """The shards that have a commit record."""
        return {
            int(item.path.rpartition("/")[2].removesuffix(".json"))
            for item in self.store.list(f"{run_folder(self.run)}/parts")
        }

    def recorded(self, shards: Sequence[Shard]) -> dict[int, Part]:
        """The published parts by their commit records alone, kept ones too; only reads."""
        kept = read_kept_parts(self.store, self.run).parts
        present = self.recorded_numbers()
        with ThreadPoolExecutor(_RECORD_THREADS) as pool:
            own = [shard for shard in shards if shard.number in present - kept.keys()]
            found = {part.shard: part for part in pool.map(self._read_record, own)}
        return found | {item.number: kept[item.number] for item in shards if item.number in kept}

    def summarised(self, shards: Sequence[Shard]) -> dict[int, Part]:
        """As :meth:`recorded`, for people: of a run that succeeded its manifest says the same in
        one read, however many parts there are."""
        listed = self._manifest_of_success()
        if listed is not None and all(shard.number in listed for shard in shards):
            return {shard.number: listed[shard.number] for shard in shards}
        return self.recorded(shards)

    def _manifest_of_success(self) -> dict[int, Part] | None:
        """The parts in the manifest that ``_SUCCESS`` names; None where there is none."""
        try:
            named = json.loads(self.store.read(SUCCESS) or b"null")
            if named is None or named["run_id"] != self.run:
                return None
            listed = json.loads(self.store.read(named["manifest"]) or b"null")["parts"]
            found = {}
            for item in listed:
                del item["run"]
                found[int(item["shard"])] = Part(
                    **{**item, "counts": Counts.from_json(item["counts"])}
                )
        except (ValueError, TypeError, KeyError):
            return None  # whatever stands there, the records are still to be read
        return found

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

        Truth is the listing. The journal goes with a success, but for shards that a retry was cut
        off at. Raises when a shard that did not
        fail has no part. May be called again: equal content is not written twice.
        """
        parts = self.committed(shards, known, failed)
        missing = [item.name for item in shards if item.number not in {*parts, *failed}]
        if missing or (success and failed):
            raise BatchrunError(
                f"the run cannot end: {len(missing)} shards have no part"
                + (f", the first is {missing[0]}" if missing else ""),
                "submit again to run them",
            )
        counts = sum((part.counts for part in parts.values()), Counts())
        runs = read_kept_parts(self.store, self.run).runs
        manifest = {
            "run_id": self.run,
            "shards": len(shards),
            "counts": asdict(counts),
            "parts": [
                {**asdict(parts[number]), "run": runs.get(number, self.run)}
                for number in sorted(parts)
            ],
            "failed": {str(number): failed[number] for number in sorted(failed)},
        }
        name = self._write_manifest(manifest)
        if success:
            # Every row is in a part; what a retry that was cut off has tried is nowhere else.
            delete_journal(self.store, self.run, spare=unfinished_shards(self.store, self.run))
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
    """A run ready to go on: all its shards, the types of its columns, and what is done.

    With ``retry`` failed rows of ``parts`` are to be tried again, and ``shards`` are only those
    that have a part; ``num_unfinished`` others are left as they are.
    """

    directory: RunDirectory
    shards: tuple[Shard, ...]
    schema: InputSchema
    parts: Mapping[int, Part]
    retry: Retry | None = None
    num_unfinished: int = 0

    @property
    def total_rows(self) -> int:
        """Rows of the whole input."""
        return count_rows(self.shards)


def check_output(
    store: Store, semantic: Mapping[str, object], *, keep_finished: bool = False
) -> None:
    """Raise :class:`~batchrun.errors.OutputError` if the output holds anything but this run.

    Only reads. Says what changed in the job, and the ways on. With ``keep_finished`` the run of
    another job is nothing to object to.
    """
    run = run_id(semantic)
    other = find_run(store)
    if other is not None and other != run and not keep_finished:
        changed = _differences(read_semantic(store, other), semantic)
        raise OutputError(
            f"output: {store.url} holds the run of another job; what changed: "
            + ("; ".join(changed[:12]) or "unknown"),
            _CHANGED_JOB_WAYS,
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
    """The id of the run in this output, the newest where parts of earlier ones were kept."""
    return newest_run(store)


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
    *,
    keep_finished: PartFormat | None = None,
) -> OpenedRun:
    """Begin or resume the run of a job in ``store``; only while its lock is held.

    With ``keep_finished``, which says what the job's parts look like, finished parts stay: those of
    another job's run, and those of input that changed since. Only the rest is planned.

    Raises OutputError when the output holds another job's run or foreign files, InputError when
    a finished file changed or vanished or a new one does not fit. ``_SUCCESS`` goes before
    anything new is planned.
    """
    keeps = keep_finished is not None
    check_output(store, semantic, keep_finished=keeps)
    store.sweep()
    directory = RunDirectory(store, run_id(semantic), n=rule.n)
    token = uuid.uuid4().hex
    job = {"run_id": directory.run, "semantic": semantic, "job": resolved_job}
    before = find_run(store)
    if keep_finished is not None and before not in {None, directory.run}:
        assert before is not None
        _take_over(directory, before, files, rule, keep_finished, job)
    recover(store, directory.run)
    # Looked at first: a plan that cannot be made leaves no trace.
    plan = read_plan(store, directory.run, rule.columns)
    while True:
        shards = tuple(plan.shards.values())
        parts = directory.committed(shards) if shards else {}
        change = change_plan(plan, files, rule, parts, keep_finished=keeps)
        if plan.num_files and not change.added and not change.dropped:
            break
        _write_job(store, directory.run, job)
        if change.added:
            store.delete([SUCCESS])
        if append_plan(store, directory.run, plan, change, token):
            delete_journal(store, directory.run, change.dropped)
            break
        plan = read_plan(store, directory.run, rule.columns)
    directory.clear_failed()
    _refuse_strangers(directory, (*change.kept, *change.added))
    return OpenedRun(directory, (*change.kept, *change.added), change.schema, parts)


def check_open(
    store: Store, semantic: Mapping[str, object], files: Sequence[InputFile], rule: PlanRule
) -> None:
    """Raise what :func:`open_run` would of a run that is begun; only reads."""
    directory = RunDirectory(store, run_id(semantic), n=rule.n)
    check_output(store, semantic)
    if find_run(store) is None:
        return
    plan = read_plan(store, directory.run, rule.columns)
    finished = directory.recorded_numbers() | read_kept_parts(store, directory.run).parts.keys()
    change = change_plan(plan, files, rule, finished)
    _refuse_strangers(directory, (*change.kept, *change.added))


def check_run(store: Store, semantic: Mapping[str, object]) -> None:
    """Raise OutputError unless the output holds the run of this job; says what differs."""
    run = require_run(store)
    if run != run_id(semantic):
        changed = _differences(read_semantic(store, run), semantic)
        raise OutputError(
            f"output: {store.url} holds the run of another job, and a retry runs rows as they were "
            "run; what differs: " + ("; ".join(changed[:12]) or "unknown"),
            "give the job as it was submitted, or the output instead of the job file",
        )


def open_retry(
    store: Store,
    semantic: Mapping[str, object],
    files: Sequence[InputFile],
    rule: PlanRule,
    kinds: Sequence[ErrorKind],
) -> OpenedRun:
    """Open the run of a job to try rows again that failed with one of ``kinds``; only while its
    lock is held. Input that is new or has changed is none of its business.

    Raises OutputError when the output holds another run, or none.
    """
    check_run(store, semantic)
    store.sweep()
    directory = RunDirectory(store, run_id(semantic), n=rule.n)
    recover(store, directory.run)
    plan = read_plan(store, directory.run, rule.columns)
    if plan.schema is None:
        raise OutputError(f"output: the run in {store.url} has no plan yet", "submit the job")
    shards = moved(plan, files)
    parts = directory.committed(shards)
    finished = tuple(shard for shard in shards if shard.number in parts)
    directory.clear_failed()
    retry = begin_retry(store, directory.run, parts, kinds, rule.n)
    num_unfinished = len(shards) - len(finished)
    return OpenedRun(directory, finished, plan.schema, parts, retry, num_unfinished)


def read_job(store: Store) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """What determines the content of the run in ``store``, and its whole job without secrets.

    Raises OutputError when there is no run.
    """
    run = require_run(store)
    path = f"{run_folder(run)}/job.json"
    try:
        record = json.loads(store.read(path) or b"null")
        semantic, job = record["semantic"], record["job"]
        if not (isinstance(semantic, dict) and isinstance(job, dict)):
            raise ValueError("it holds no job")
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"output: {store.url}/{path} is damaged ({error!r})", "give the job file instead"
        ) from error
    return semantic, job


def _take_over(
    directory: RunDirectory,
    before: str,
    files: Sequence[InputFile],
    rule: PlanRule,
    part_format: PartFormat,
    job: Mapping[str, object],
) -> None:
    """Make the run of ``directory`` the one of its output, with the finished parts of ``before``.

    The last step is the one that counts: cut off before it, the output holds the old run.
    """
    store, run = directory.store, directory.run
    recover(store, before)
    plan = read_plan(store, before, rule.columns)
    shards = tuple(plan.shards.values())
    old = RunDirectory(store, before, n=samples_per_row(store, before))
    parts = old.committed(shards) if shards else {}
    change = _keepable(store, before, plan, parts, files, rule, part_format)
    store.delete([SUCCESS])
    planned = read_plan(store, run, rule.columns)
    wanted = {shard.number: shard for shard in (*change.kept, *change.added)}
    new = PlanChange(
        added=tuple(item for item in wanted.values() if planned.shards.get(item.number) != item),
        dropped=tuple(number for number in planned.shards if number not in wanted),
        kept=(),
        schema=change.schema,
    )
    if new.added or new.dropped or not planned.num_files:
        if not append_plan(store, run, planned, new, uuid.uuid4().hex):
            raise OutputHeldError(f"another driver plans {store.url} too", "submit again")
    kept = {number: part for number, part in parts.items() if number in wanted}
    keep_parts(store, run, before, kept, wanted.values())
    _write_job(store, run, job)
    delete_journal(store, before)


def check_keepable(
    store: Store,
    semantic: Mapping[str, object],
    files: Sequence[InputFile],
    rule: PlanRule,
    part_format: PartFormat,
) -> None:
    """Raise OutputError unless a run of this job could take over what is finished in ``store``.

    Only reads.
    """
    before = find_run(store)
    if before is None or before == run_id(semantic):
        return
    plan = read_plan(store, before, rule.columns)
    parts = RunDirectory(store, before).recorded(tuple(plan.shards.values()))
    _keepable(store, before, plan, parts, files, rule, part_format)


def _keepable(
    store: Store,
    before: str,
    plan: Plan,
    parts: Mapping[int, Part],
    files: Sequence[InputFile],
    rule: PlanRule,
    part_format: PartFormat,
) -> PlanChange:
    """What becomes of the plan of the run ``before`` when its ``parts`` are kept; raises where
    they would not fit beside parts of ``part_format``."""
    change = change_plan(plan, files, rule, parts, keep_finished=True)
    runs = read_kept_parts(store, before).runs
    check_columns(store, parts.values(), runs, part_format.schema(change.schema.carried))
    for shard in plan.shards.values():
        if shard.number in parts and parts[shard.number].num_rows != shard.num_rows * rule.n:
            raise OutputError(
                f"output: the finished parts of {store.url} do not have {rule.n} samples a row",
                _WAYS_ON,
            )
    return change


def _write_job(store: Store, run: str, job: Mapping[str, object]) -> None:
    """The job's record; while it is there, the output is known as this run's."""
    data = json.dumps(job, indent=1).encode()
    store.put_if_absent(f"{run_folder(run)}/job.json", data, uuid.uuid4().hex)


def _refuse_strangers(directory: RunDirectory, shards: Sequence[Shard]) -> None:
    """Raise for a Parquet file in the output that is no part of this run: readers would see it."""
    store = directory.store
    kept = read_kept_parts(store, directory.run).parts
    names = {
        kept[shard.number].name if shard.number in kept else part_name(directory.run, shard)
        for shard in shards
    }
    for item in store.list(recursive=False):
        if item.path.endswith(".parquet") and item.path not in names:
            raise OutputError(
                f"output: {store.url} holds {item.path}, which is no part of this run",
                "move it away",
            )


def samples_per_row(store: Store, run: str) -> int:
    """How many samples a row of the run has, as its job says."""
    generation = read_semantic(store, run).get("generation")
    found = generation.get("n") if isinstance(generation, dict) else None
    return found if isinstance(found, int) else 1


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
