"""A run's bookkeeping beside its parts. What is true of a run is what object storage lists."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from batchrun.data.journal import delete_journal
from batchrun.data.kept import read_kept_parts
from batchrun.data.layout import (
    MANIFEST_NAME,
    PART_NAME,
    SUCCESS,
    commit_path,
    epoch_path,
    epochs_folder,
    failed_path,
    part_name,
    run_folder,
    traces_path,
)
from batchrun.data.lock import read_lock
from batchrun.data.parts import (
    check_part,
    part_from_json,
    part_from_object,
    part_metadata,
    part_to_json,
)
from batchrun.data.retry import unfinished_shards
from batchrun.data.store import Store
from batchrun.data.writer import PartFile
from batchrun.errors import BatchrunError, OutputError, ShardError, StorageError
from batchrun.records import Counts, Lease, Part, Shard

WAYS_ON = "choose another output, or run `batchrun discard OUTPUT` first"
"""The hint where what an output holds cannot be gone on with."""

_RECORD_THREADS = 16


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
        """Raise StorageError when the run was discarded, or planned anew by another driver, since
        that of ``epoch`` began it.

        For a worker that publishes, just before it does: one that nobody could end (its machine was
        out of reach) leaves no part in an output that others took for empty, nor one whose rows
        others run under another name. What it has sent already by then may still arrive: a part
        that is none of the run, which ``verify`` tells of.
        """
        if self.store.info(epoch_path(self.run, epoch)) is None:
            raise StorageError(
                f"output: the run of this worker is no longer in {self.store.url}: it was "
                "discarded or deleted by hand, or another driver has planned it anew",
                "submit again",
            )

    def bar_workers(self) -> None:
        """From here on no worker of earlier drivers publishes any more (:meth:`check_stands`).
        Only for the holder of the run lock."""
        lock = read_lock(self.store)
        own = None if lock is None else epoch_path(self.run, lock.epoch)
        paths = [item.path for item in self.store.list(epochs_folder(self.run))]
        self.store.delete([path for path in paths if path != own])

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
                f"output: {self.store.url}/{path} is damaged ({error})", WAYS_ON
            ) from error


def success_counts(counts: Counts) -> dict[str, object]:
    """The counts as ``_SUCCESS`` holds them: with a report of the scores where there are some."""
    found: dict[str, object] = asdict(counts)
    del found["scores"]
    if counts.scores is not None:
        found["evaluation"] = counts.scores.report()
    return found
