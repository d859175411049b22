"""What a run looks like from its output alone, and how to remove it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from batchrun.data.jobrecord import require_run, samples_per_row
from batchrun.data.journal import read_journal
from batchrun.data.kept import read_kept_parts
from batchrun.data.layout import FOLDER, LOCK, PART_NAME, SUCCESS, journal_folder
from batchrun.data.lock import BEAT_S, Holder, is_live, read_lock
from batchrun.data.plan import count_rows, read_plan
from batchrun.data.run import Progress, RunDirectory
from batchrun.data.schema import InputColumns
from batchrun.data.store import Store
from batchrun.data.writer import PartFormat
from batchrun.errors import OutputError, OutputHeldError
from batchrun.records import Counts, Part, Shard


class RunState(StrEnum):
    """What can be said of a run in a word or two."""

    LIVE = "live"
    FINISHED = "finished"
    FAILED = "finished with failures"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The state of a run, for ``batchrun status``.

    ``parts`` are the published ones by shard number.
    ``counts`` are sums over published parts, or the driver's own when it lives and knows more;
    of a run that nobody drives they include ``journaled_rows``, which the next submit publishes.
    ``kept`` says how many of the parts are of other runs, by run, where a changed job took them
    over.
    """

    run_id: str
    live: bool
    succeeded: bool
    num_shards: int
    shards_done: int
    failed_shards: dict[int, str]
    total_rows: int
    counts: Counts
    holder: Holder | None
    progress: Progress | None
    journaled_rows: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[int, Part] = field(default_factory=dict)

    @property
    def state(self) -> RunState:
        """Whether it goes on, and if not, how it ended."""
        if self.live:
            return RunState.LIVE
        if self.succeeded:
            return RunState.FINISHED
        if self.shards_done + len(self.failed_shards) == self.num_shards:
            return RunState.FAILED
        return RunState.STOPPED

    @property
    def rows_left(self) -> int:
        """Rows that are neither done nor failed."""
        return max(0, self.total_rows - self.counts.rows)


def read_status(store: Store) -> RunStatus:
    """The state of the run in ``store``. Only reads, from any machine.

    Raises :class:`~batchrun.errors.OutputError` when there is no run.
    """
    run = require_run(store)
    directory = RunDirectory(store, run)
    shards = tuple(read_plan(store, run, InputColumns()).shards.values())
    parts = directory.summarised(shards)
    progress = directory.read_progress()
    lock = read_lock(store)
    live = is_live(store, watch_s=BEAT_S + 1)  # a person waits, and nothing is lost by a mistake
    failed = {number: why for number, why in directory.failed().items() if number not in parts}
    counts = sum((part.counts for part in parts.values()), Counts())
    journaled = Counts()
    if not live:
        left = [item for item in shards if item.number not in parts and item.number not in failed]
        journaled = _count_journals(store, run, left)
        counts += journaled
    if live and progress is not None and progress.counts.rows > counts.rows:
        counts = progress.counts
    return RunStatus(
        run_id=run,
        live=live,
        succeeded=store.info(SUCCESS) is not None,
        num_shards=len(shards),
        shards_done=len(parts),
        failed_shards=failed,
        total_rows=count_rows(shards),
        counts=counts,
        holder=lock.holder if live and lock is not None else None,
        progress=progress,
        journaled_rows=journaled.rows,
        kept=read_kept_parts(store, run).num_parts,
        parts=parts,
    )


def _count_journals(store: Store, run: str, shards: Sequence[Shard]) -> Counts:
    """The rows of these shards that wait in the journal with all their samples."""
    present = set(store.folders(journal_folder(run)))
    n = samples_per_row(store, run)
    counts = Counts()
    for shard in shards:
        if f"{shard.number:06d}" not in present:
            continue
        finished = read_journal(store, run, shard, n).finished
        for ordinal in dict.fromkeys(key[0] for key in finished):
            samples = [finished.get((ordinal, sample)) for sample in range(n)]
            row = [sample for sample in samples if sample is not None]
            if len(row) == n:
                is_scored = row[0].verdict is not None
                counts += PartFormat(run, n=n, correct=is_scored).count(row)
    return counts


def discard(store: Store) -> int:
    """Delete the run's parts and bookkeeping; the number of objects deleted.

    Only names that a run gives are touched: ``_SUCCESS`` first, then what lets workers publish
    (:meth:`~batchrun.data.run.RunDirectory.check_stands`), and the bookkeeping last, so that a
    discard that was cut off can be repeated. Raises OutputHeldError while the run is live,
    OutputError when there is no run.
    """
    bookkeeping = [item.path for item in store.list(FOLDER)]
    if not bookkeeping:
        raise OutputError(f"output: {store.url} holds no run of batchrun", "check the path")
    if is_live(store):
        raise OutputHeldError(f"the run in {store.url} is live", "stop it first")
    store.delete([SUCCESS])
    # From here on no worker publishes any more; what one has sent before is listed after it.
    fences = [path for path in bookkeeping if "/epochs/" in path]
    store.delete(fences)
    bookkeeping = [item.path for item in store.list(FOLDER)]
    parts = [item.path for item in store.list(recursive=False) if PART_NAME.fullmatch(item.path)]
    store.delete(parts)
    # The job's record goes last: while it is there, the output is known as a run's.
    last = [path for path in bookkeeping if path.endswith("/job.json") or path == LOCK]
    store.delete([path for path in bookkeeping if path not in last])
    store.delete(last)
    store.sweep()
    return len(parts) + len(fences) + len(bookkeeping)
