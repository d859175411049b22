"""Beginning a run, and going on with one: what the output holds, held against the job.

Each of the functions that open a run needs the run lock; those that check only read.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from batchrun.data.footers import InputFile
from batchrun.data.jobrecord import (
    differences,
    find_run,
    read_semantic,
    require_run,
    samples_per_row,
    write_job,
)
from batchrun.data.journal import delete_journal
from batchrun.data.kept import check_columns, keep_parts, read_kept_parts
from batchrun.data.layout import SUCCESS, part_name, run_id
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
from batchrun.data.retry import Retry, begin_retry, recover
from batchrun.data.run import WAYS_ON, RunDirectory
from batchrun.data.schema import InputSchema
from batchrun.data.store import Store
from batchrun.data.writer import PartFormat
from batchrun.errors import OutputError, OutputHeldError
from batchrun.records import ErrorKind, Part, Shard

_CHANGED_JOB_WAYS = (
    "choose another output, run `batchrun discard OUTPUT` first, or submit with `--keep-finished`: "
    "then finished parts stay and the rest runs with the new job"
)


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
        changed = differences(read_semantic(store, other), semantic)
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
        changed = differences(read_semantic(store, run), semantic)
        raise OutputError(
            f"output: {store.url} holds the run of another job, and a retry runs rows as they were "
            "run; what differs: " + ("; ".join(changed[:12]) or "unknown"),
            "give the job as it was submitted, or the output instead of the job file",
        )


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


def open_run(
    store: Store,
    semantic: Mapping[str, object],
    resolved_job: Mapping[str, object],
    files: Sequence[InputFile],
    rule: PlanRule,
    *,
    keep_finished: PartFormat | None = None,
    confirm: Callable[[], None] = lambda: None,
) -> OpenedRun:
    """Begin or resume the run of a job in ``store``; only while its lock is held: ``confirm``
    raises when it is lost.

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
        recover(store, before, confirm)
        _take_over(directory, before, files, rule, keep_finished, job)
    recover(store, directory.run, confirm)
    # Looked at first: a plan that cannot be made leaves no trace.
    plan = read_plan(store, directory.run, rule.columns)
    while True:
        shards = tuple(plan.shards.values())
        parts = directory.committed(shards) if shards else {}
        change = change_plan(plan, files, rule, parts, keep_finished=keeps)
        if plan.num_files and not change.added and not change.dropped:
            break
        write_job(store, directory.run, job)
        if change.added:
            store.delete([SUCCESS])
        if change.dropped:
            # A part of one would stand beside those of the shards that take its place.
            directory.bar_workers()
        if append_plan(store, directory.run, plan, change, token):
            delete_journal(store, directory.run, change.dropped)
            break
        plan = read_plan(store, directory.run, rule.columns)
    directory.clear_failed()
    _refuse_strangers(directory, (*change.kept, *change.added))
    return OpenedRun(directory, (*change.kept, *change.added), change.schema, parts)


def open_retry(
    store: Store,
    semantic: Mapping[str, object],
    files: Sequence[InputFile],
    rule: PlanRule,
    kinds: Sequence[ErrorKind],
    confirm: Callable[[], None] = lambda: None,
) -> OpenedRun:
    """Open the run of a job to try rows again that failed with one of ``kinds``; only while its
    lock is held, and ``confirm`` as for :func:`open_run`. Input that is new or has changed is none
    of its business.

    Raises OutputError when the output holds another run, or none.
    """
    check_run(store, semantic)
    store.sweep()
    directory = RunDirectory(store, run_id(semantic), n=rule.n)
    recover(store, directory.run, confirm)
    plan = read_plan(store, directory.run, rule.columns)
    if plan.schema is None:
        raise OutputError(f"output: the run in {store.url} has no plan yet", "submit the job")
    shards = moved(plan, files)
    parts = directory.committed(shards)
    finished = tuple(shard for shard in shards if shard.number in parts)
    retry = begin_retry(store, directory.run, parts, kinds, rule.n)
    num_unfinished = len(shards) - len(finished)
    return OpenedRun(directory, finished, plan.schema, parts, retry, num_unfinished)


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
    plan = read_plan(store, before, rule.columns)
    shards = tuple(plan.shards.values())
    old = RunDirectory(store, before, n=samples_per_row(store, before))
    # What comes later than the listing would stand beside the parts of this run, with their rows.
    old.bar_workers()
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
    write_job(store, run, job)
    delete_journal(store, before)


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
                WAYS_ON,
            )
    return change


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
