"""Work that is cut off anywhere goes on from the journal: nothing lost, nothing twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from batchrun.data.checkpoints import find_checkpoint
from batchrun.data.journal import Journal, JournalWriter, read_journal
from batchrun.data.store import Store
from batchrun.engine.engine import Engine
from batchrun.engine.model_runner import Drawn, Pass
from batchrun.engine.options import EngineOptions
from batchrun.engine.request import Output
from batchrun.errors import OutputError, StorageError
from batchrun.pipeline import Pipeline
from batchrun.records import Completion, ErrorKind, FinishReason, Lease, Part, RowError, Shard
from batchrun.reports import WorkReport
from batchrun.rows import Rows
from tests.unit.test_pipeline import Setup, sums

LONG = {"generation": {"max_tokens": 40, "ignore_eos": True, "temperature": 2.0, "n": 2}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """The embedded model; equal to the byte whatever is cut."""
    options = EngineOptions(max_sequences=4, deterministic=True)
    return Engine.load(find_checkpoint("tiny"), options)


@pytest.fixture(autouse=True)
def whole_engine(engine: Engine) -> Iterator[None]:
    """After each test nothing is left in the engine, and nobody listens to it."""
    yield
    assert engine.num_unfinished == 0 and engine.on_admit is None
    engine.check_integrity()


class Journals:
    """Journals in a folder; counts what is written."""

    def __init__(self, folder: Path, n: int = 1) -> None:
        self.store = Store.open(str(folder))
        self.n = n
        self.num_flushes = 0
        self.broken = 0

    def read(self, shard: Shard) -> Journal:
        """As a worker does."""
        return read_journal(self.store, "r", shard, self.n)

    def write(self, lease: Lease) -> JournalWriter:
        """As a worker does, but for storage that may be broken for some flushes."""
        outer, writer = self, JournalWriter(self.store, "r", lease)
        flush = writer.flush

        def counted(*args: object) -> None:
            if outer.broken:
                outer.broken -= 1
                raise StorageError("the bucket is away")
            outer.num_flushes += 1
            flush(*args)  # type: ignore[arg-type]

        writer.flush = counted  # type: ignore[method-assign]
        return writer


class Flight:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.rows: set[tuple[int, int]] = set()
        self.seen: list[set[tuple[int, int]]] = []

    def set(self, rows: Iterable[tuple[int, int]]) -> None:
        """These rows."""
        self.rows = set(rows)
        self.seen.append(self.rows)


class Run:
    """One shard of so many prompts, worked at by one pipeline after the other."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        prompts: Sequence[object],
        job: Mapping[str, Mapping[str, object]] | None = None,
        interval_s: float = 1000.0,
        extra: Mapping[str, Sequence[object]] | None = None,
    ) -> None:
        sections = {**(job or {}), "checkpoint": {"interval_s": interval_s}}
        self.setup = Setup(folder, engine, [prompts], sections, extra)
        self.setup.pipeline.close()
        self.engine = engine
        self.journals = Journals(folder / "out", self.setup.job.generation.n)
        self.flight = Flight()
        self.keeps_finished = False
        self._num_attempts = 0
        self.clock = 0.0

    def pipeline(self) -> Pipeline:
        """A new worker's pipeline."""
        old = self.setup.pipeline
        return Pipeline(
            self.setup.job,
            self.engine,
            self.setup.publish,
            old._schema,
            old._format,
            clock=lambda: self.clock,
            journals=self.journals,
            flight=self.flight,
            keeps_finished=self.keeps_finished,
        )

    def lease(self, rows: Rows | None = None, lost: Mapping[int, str] | None = None) -> Lease:
        """The whole shard, or some rows of it."""
        [shard] = self.setup.shards
        self._num_attempts += 1
        wanted = Rows.all(shard.num_rows) if rows is None else rows
        attempt = f"000001-{self._num_attempts:06d}"
        return Lease(shard, 1, attempt, wanted, whole=rows is None, lost=lost or {})

    def end(self, pipeline: Pipeline) -> list[WorkReport]:
        """Work to the end."""
        reports = [pipeline.work(1.0)]
        while not reports[-1].idle:
            self.clock += 0.3
            reports.append(pipeline.work(1.0))
        pipeline.close()
        return reports

    def steps(self, pipeline: Pipeline, count: int) -> None:
        """So many engine steps, without an end of a lease."""
        for item in pipeline._leases:
            item.opening.result()
            item.reader._next.result()
        for _ in range(count):
            pipeline._admit()
            pipeline._rows.step()

    def whole(self, **lease: Mapping[int, str]) -> tuple[list[dict[str, object]], WorkReport]:
        """The part, made by a new worker, and its last report."""
        pipeline = self.pipeline()
        pipeline.start(self.lease(**lease))
        report = self.end(pipeline)[-1]
        return self.setup.published[0].to_pylist(), report


MakeRun = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, engine: Engine) -> MakeRun:
    """Makes a :class:`Run` in a folder of its own."""
    made: list[Run] = []

    def build(*args: object, **more: object) -> Run:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Run(folder, engine, *args, **more))  # type: ignore[arg-type]
        return made[-1]

    return build


def sampled(run: Run) -> int:
    """Tokens sampled by the engine so far."""
    return run.engine.stats().sampled_tokens


def test_a_short_lease_writes_no_journal(make: MakeRun) -> None:
    """A whole lease that ends before its first interval costs one put, as its part."""
    run = make(sums(6))
    run.whole()
    assert run.journals.num_flushes == 0
    assert run.journals.store.list("_batchrun") == ()


@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"max_thinking_tokens": 7, "logprobs": 1},
        {"response_format": {"type": "regex", "pattern": "[0-9]{30,60}"}, "max_thinking_tokens": 9},
        {"stop": ["7"], "temperature": 0.0, "max_tokens": 64, "ignore_eos": False, "n": 1},
    ],
)
def test_a_worker_that_drains_hands_over_every_token(
    make: MakeRun, generation: dict[str, object]
) -> None:
    """Whatever runs when the work has to stop goes on at another worker at that very token: the
    part is that of an undisturbed run, to the byte, and nothing is sampled twice."""
    job = {"generation": {**LONG["generation"], **generation}}
    undisturbed = make(sums(8), job)
    before = sampled(undisturbed)
    expected, _ = undisturbed.whole()
    cost = sampled(undisturbed) - before
    for num_steps in (1, 25, 45):
        run = make(sums(8), job)
        before = sampled(run)
        first = run.pipeline()
        lease = run.lease()
        first.start(lease)
        run.steps(first, num_steps)
        report = first.finish(10.0)
        assert [item.attempt for item in report.returned] == [lease.attempt], num_steps
        assert (report.discarded_tokens, run.flight.rows) == (0, set()), num_steps
        rows, _ = run.whole()
        assert rows == expected, num_steps
        assert sampled(run) - before == cost, num_steps


def test_what_is_in_flight_is_handed_over_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps overlap, the tokens of the last one wait for a next one that does not come."""
    options = EngineOptions(max_sequences=4, overlap=True)
    run = Run(tmp_path, Engine.load(find_checkpoint("tiny"), options), sums(3), LONG)
    sample, num_drawn = run.engine.runner.sample, 0

    def counting(passes: list[Pass]) -> list[Drawn]:
        nonlocal num_drawn
        drawn = sample(passes)
        num_drawn += sum(len(one.sequences) for one in drawn)
        return drawn

    monkeypatch.setattr(run.engine.runner, "sample", counting)
    pipeline = run.pipeline()
    pipeline.start(run.lease())
    run.steps(pipeline, 12)
    assert sampled(run) < num_drawn
    assert pipeline.finish(10.0).discarded_tokens == 0
    running = run.journals.read(run.setup.shards[0]).running.values()
    assert sum(len(generated.token_ids) for generated in running) == num_drawn == sampled(run)


def test_a_killed_worker_loses_what_came_after_its_last_flush(make: MakeRun) -> None:
    """Every interval all that is finished and begun is made safe, over and over."""
    undisturbed = make(sums(6), LONG)
    before = sampled(undisturbed)
    expected, _ = undisturbed.whole()
    cost = sampled(undisturbed) - before
    run = make(sums(6), LONG, interval_s=10.0)
    before = sampled(run)
    pipeline = run.pipeline()
    pipeline.start(run.lease())
    saved = unsaved = 0
    for step in range(60):
        run.steps(pipeline, 1)
        run.clock += 1.0
        pipeline._saving.flush_due(pipeline._leases, pipeline._rows.running)
        while any(item.flushing is not None for item in pipeline._leases):
            pipeline._collect(1.0, [], [])
        unsaved = pipeline._num_unsaved_tokens()
        if unsaved == 0:
            saved += 1
        assert unsaved <= 4 * 10, step
    assert (saved, run.journals.num_flushes) == (6, 6)
    for _ in range(5):
        run.steps(pipeline, 1)
    unsaved = pipeline._num_unsaved_tokens()
    assert unsaved > 0
    pipeline.close()  # without another word, as after SIGKILL
    rows, _ = run.whole()
    assert rows == expected
    assert sampled(run) - before == cost + unsaved


def test_ranges_feed_a_part(make: MakeRun) -> None:
    """Two workers run ranges of one shard; a whole lease makes their rows a part without a step."""
    expected, _ = make(sums(9), LONG).whole()
    run = make(sums(9), LONG)
    for ranges in ([(0, 2), (5, 9)], [(2, 5)]):
        pipeline = run.pipeline()
        rows = Rows.of_ranges(ranges)
        pipeline.start(run.lease(rows))
        report = run.end(pipeline)[-1]
        [done] = report.done
        assert (done.part, done.counts.rows, done.fresh.rows) == (None, len(rows), len(rows))
        assert run.setup.published == {}
    before = sampled(run)
    rows_of_part, report = run.whole()
    assert rows_of_part == expected
    [done] = report.done
    assert (sampled(run) - before, done.fresh.rows, done.handed_over) == (0, 0, done.counts)


def test_a_range_takes_what_the_journal_has(make: MakeRun) -> None:
    """Rows that are journaled already count as done and are not generated again; it is known which
    of them are of an earlier driver."""
    run = make(sums(8))
    for end, epoch, handed_over in ((3, 1, 0), (5, 2, 0), (8, 2, 2)):
        pipeline = run.pipeline()
        lease = run.lease(Rows.of_ranges([(0, end)]))
        attempt = lease.attempt.replace("000001-", f"{epoch:06d}-")
        pipeline.start(replace(lease, epoch=epoch, attempt=attempt))
        [done] = run.end(pipeline)[-1].done
        counted = (done.counts.rows, done.fresh.rows, done.handed_over.rows)
        assert counted == (end, 2 if end == 5 else 3, handed_over)


def test_lost_rows_are_error_rows(make: MakeRun) -> None:
    """Rows that are given up are in the part with the reason, whatever the journal has of them;
    the others are answered."""
    run = make(sums(5))
    pipeline = run.pipeline()
    pipeline.start(run.lease(Rows.of([1])))
    run.end(pipeline)
    rows, report = run.whole(lost={1: "3 workers died with it", 3: "so did this"})
    assert [row["error"] for row in rows] == [
        None, "worker_lost: 3 workers died with it", None, "worker_lost: so did this", None,
    ]  # fmt: skip
    assert [row["completion"] is None for row in rows] == [False, True, False, True, False]
    assert report.done[0].counts.failed_rows == 2


def test_a_cancelled_lease_leaves_the_others_alone(make: MakeRun) -> None:
    """Its rows leave the engine, and its tokens are discarded ones."""
    run = make(sums(12), LONG)
    pipeline = run.pipeline()
    first, second = run.lease(Rows.of_ranges([(0, 2)])), run.lease(Rows.of_ranges([(2, 4)]))
    for lease in (first, second):
        pipeline.start(lease)
    run.steps(pipeline, 3)
    pipeline.cancel(first.attempt)
    pipeline.cancel("unknown")
    reports = run.end(pipeline)
    assert [done.lease.attempt for report in reports for done in report.done] == [second.attempt]
    assert reports[-1].discarded_tokens > 0
    assert {key[0] for key in run.journals.read(run.setup.shards[0]).finished} == {2, 3}


def test_storage_may_fail_once(make: MakeRun) -> None:
    """What could not be journaled goes with the next flush; the second failure in a row ends."""
    run = make(sums(4))
    run.journals.broken = 1
    pipeline = run.pipeline()
    pipeline.start(run.lease(Rows.all(4)))
    [done] = run.end(pipeline)[-1].done
    assert done.counts.rows == 4
    assert len(run.journals.read(run.setup.shards[0]).finished) == 4
    run = make(sums(4))
    run.journals.broken = 2
    pipeline = run.pipeline()
    pipeline.start(run.lease(Rows.all(4)))
    with pytest.raises(StorageError, match="the bucket is away"):
        run.end(pipeline)
    pipeline.close()


def test_what_storage_refuses_of_a_lease_costs_the_others_nothing(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has to stop makes safe what storage takes: neither a part that cannot be
    published nor a journal that cannot be written keeps another lease from its own, and what was
    to be published is journaled."""
    run = make(sums(2))
    pipeline = run.pipeline()
    first, second = run.lease(Rows.of([0])), run.lease(Rows.of([1]))
    for lease in (first, second):
        pipeline.start(lease)
    run.steps(pipeline, 3)
    pipeline._leases[0]._num_failed_flushes = 1

    def refuse(*args: object) -> None:
        raise StorageError("the bucket is away")

    monkeypatch.setattr(pipeline._saving._writers[first.attempt], "flush", refuse)
    report = pipeline.finish(10.0)
    assert [item.attempt for item in report.returned] == [first.attempt, second.attempt]
    begun = run.journals.read(run.setup.shards[0]).running
    assert list(begun) == [(1, 0)]
    pipeline = run.pipeline()
    third = run.lease()
    pipeline.start(third)

    def refuse_part(*args: object) -> None:
        raise OutputError("the record of the part is damaged")

    monkeypatch.setattr(pipeline._saving, "_publish", refuse_part)
    while not pipeline._leases[0].has_all_rows:
        run.steps(pipeline, 1)
    report = pipeline.finish(10.0)
    assert [(item.attempt, item.fresh.rows) for item in report.returned] == [(third.attempt, 2)]
    assert len(run.journals.read(run.setup.shards[0]).finished) == 2


def test_a_part_that_takes_long_holds_up_no_journal(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While storage takes its time with a part, the rows of other leases are made safe, and after
    an interval those of the part are too: with a worker never more is lost than that."""
    run = make(sums(4), interval_s=10.0)
    pipeline = run.pipeline()
    publish, may_go_on = pipeline._saving._publish, threading.Event()

    def slow(*args: Any) -> Part:
        assert may_go_on.wait(60)
        return publish(*args)

    monkeypatch.setattr(pipeline._saving, "_publish", slow)
    whole, other = run.lease(), run.lease(Rows.of([0]))
    pipeline.start(whole)
    while not pipeline._leases[0].publishing:
        pipeline.work(0.0)
    assert run.journals.num_flushes == 0
    run.clock += 10.0
    pipeline.start(other)
    done: list[str] = []
    while pipeline._leases[-1].lease is other:
        done += [item.lease.attempt for item in pipeline.work(0.0).done]
    assert done == [other.attempt]
    while pipeline._leases[0].flushing is not None:
        pipeline.work(0.0)
    assert len(run.journals.read(run.setup.shards[0]).finished) == 4
    may_go_on.set()
    [report] = [report for report in run.end(pipeline) if report.done]
    assert report.done[0].part is not None and report.done[0].fresh.rows == 4


def test_much_text_is_journaled_before_its_time(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be lost with a worker is bounded in bytes too."""
    monkeypatch.setattr("batchrun.leases.MAX_UNSAVED_BYTES", 1000)
    run = make(sums(20))
    run.whole()
    assert 2 <= run.journals.num_flushes <= 10


def test_rows_in_flight_are_told_before_they_run(make: MakeRun) -> None:
    """A row is named before its prompt is made and before its first step, and no longer than it
    runs; so whatever a death may be due to is known."""
    run = make(sums(12))
    pipeline = run.pipeline()
    pipeline.start(run.lease())
    launch = run.engine.runner.launch

    def check(work: object) -> object:
        running = {(0, item.key[1]) for item in run.engine.running()}  # type: ignore[index]
        assert running <= run.flight.rows and len(run.flight.rows) <= 4
        return launch(work)  # type: ignore[arg-type]

    run.engine.runner.launch = check  # type: ignore[method-assign, assignment]
    try:
        run.end(pipeline)
    finally:
        run.engine.runner.launch = launch  # type: ignore[method-assign]
    assert {(0, ordinal) for ordinal in range(12)} in run.flight.seen  # as prompts


@pytest.mark.parametrize(("num_failures", "error"), [(2, None), (3, "engine: out of luck")])
def test_errors_of_the_engine_are_tried_again(
    make: MakeRun, monkeypatch: pytest.MonkeyPatch, num_failures: int, error: str | None
) -> None:
    """Up to errors.max_retries times; then the row is an error row. Its neighbours never notice."""
    run = make(sums(3))
    left = [num_failures]
    step = run.engine.step

    def failing() -> list[Output]:
        outputs = step()
        for place, output in enumerate(outputs):
            if output.key[1] == 1 and left[0]:  # type: ignore[index]
                left[0] -= 1
                reason = RowError(ErrorKind.ENGINE, "out of luck")
                outputs[place] = replace(output, finish_reason=FinishReason.ERROR, error=reason)
        return outputs

    monkeypatch.setattr(run.engine, "step", failing)
    rows, _ = run.whole()
    assert [row["error"] for row in rows] == [None, error, None]


def test_scores_survive_in_the_journal(make: MakeRun) -> None:
    """Verdicts of journaled samples are those of the part, and are not asked for again."""
    job = {"evaluate": {"answer_column": "a", "scorer": "exact"}, "generation": {"n": 2}}
    answers = {"a": pa.array([str(sum(map(int, text[8:-1].split("+")))) for text in sums(6)])}
    expected, report = make(sums(6), job, extra=answers).whole()
    run = make(sums(6), job, extra=answers)
    pipeline = run.pipeline()
    pipeline.start(run.lease(Rows.of_ranges([(1, 6)])))
    run.end(pipeline)
    rows, again = run.whole()
    assert rows == expected
    assert again.done[0].part.counts == report.done[0].part.counts  # type: ignore[union-attr]


class Kept(Journals):
    """Journals that begin with samples of a part, which has no verdicts."""

    kept: tuple[Completion, ...] = ()

    def read(self, shard: Shard) -> Journal:
        """As a worker does in a retry."""
        return read_journal(self.store, "r", shard, self.n, self.kept)


@pytest.mark.parametrize("scorer", ["number", "regex", None])
def test_samples_of_a_part_that_is_made_anew_stay(make: MakeRun, scorer: str | None) -> None:
    """Only what is missing is generated; what stays is scored again, also beside the engine, and
    neither journaled nor counted as new. Lost rows keep the samples that they have."""
    prompts = [*sums(5), None]
    answers = [str(eval(str(prompt)[8:-1])) if prompt else "1" for prompt in prompts]
    job: dict[str, dict[str, object]] = {"generation": {"n": 2, "temperature": 0.7}}
    if scorer is not None:
        job["evaluate"] = {"answer_column": "a", "scorer": scorer}
        if scorer == "regex":
            job["evaluate"]["pattern"] = r"\d+"
    run = make(prompts, job, extra={"a": answers})
    whole, report = run.whole()
    [first] = report.done
    assert first.part is not None
    missing = {(1, 0), (3, 1), (4, 0)}
    kept = Kept(run.setup.folder / "kept", 2)
    kept.kept = tuple(
        Completion(
            ordinal=place // 2,
            sample=place % 2,
            id=row["id"],
            completion=row["completion"],
            reasoning=row["reasoning"],
            finish_reason=FinishReason(row["finish_reason"]),
            prompt_tokens=row["prompt_tokens"],
            reasoning_tokens=row["reasoning_tokens"],
            completion_tokens=row["completion_tokens"],
            thinking_budget_hit=row["thinking_budget_hit"],
            error=row["error"],
        )
        for place, row in enumerate(cast(list[dict[str, Any]], whole))
        if divmod(place, 2) not in missing
    )
    run.journals, run.keeps_finished = kept, True
    before = sampled(run)
    again, report = run.whole()
    [done] = report.done
    assert done.part is not None
    assert (again, done.part.counts) == (whole, first.part.counts)
    assert (done.fresh.rows, 0 < sampled(run) - before < before) == (3, True)
    lost, report = run.whole(lost={3: "it kills"})
    assert [row["error"] for row in lost[6:8]] == [None, "worker_lost: it kills"]
    assert lost[:6] + lost[8:] == whole[:6] + whole[8:]
    assert scorer is None or lost[6]["correct"] == whole[6]["correct"]
