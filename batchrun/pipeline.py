"""From leases to parts: rows in, through the engine, completions out. No Ray in here.

1. :meth:`Pipeline.start` takes a lease; its rows are read when the engine has room, not before.
2. Rows become prompts and then requests. The engine is kept a quarter fuller than it can run, so
   a sequence that ends is replaced at the next step; rows of the next lease follow those of the
   one before without a gap. Short rows are read further ahead, so that the engine can begin with
   the longest.
3. Finished samples are scored where the job asks for it, and go to the lease's part writer,
   which puts them into input order.
4. A lease that has all its rows is published in a thread, while the engine goes on.

A bad row is a completion with an error. An unreadable shard is a failed lease. Anything else that
goes wrong is raised from :meth:`Pipeline.work`, and whoever runs the pipeline decides.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, cast

from batchrun.data.reader import ShardReader
from batchrun.data.schema import InputSchema
from batchrun.data.writer import PartFile, PartFormat, PartWriter
from batchrun.engine.chat import PromptError
from batchrun.engine.engine import Engine
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request
from batchrun.errors import CheckpointError, RequestError, ShardError
from batchrun.evaluate import ScoreSpec
from batchrun.job import Job
from batchrun.judge import Judge
from batchrun.metrics import (
    BUDGET_HITS,
    KV_PAGES_TOTAL,
    KV_PAGES_USED,
    ROW_SECONDS,
    ROWS_IN_FLIGHT,
    SLOTS_TOTAL,
    SLOTS_USED,
    STEP_SECONDS,
    TOKENS,
    WORKER_SECONDS,
    MetricsDelta,
    Recorder,
)
from batchrun.prompts import PromptBuilder
from batchrun.records import (
    Completion,
    Counts,
    ErrorKind,
    FinishReason,
    Generated,
    Lease,
    Part,
    Row,
    RowError,
    row_scores,
)
from batchrun.scores import Scores, Verdict
from batchrun.tools import is_malformed, parse_calls

MAX_LEASES = 3
"""Leases that a pipeline asks for at most: one that ends, one in the middle, one that begins."""

_WINDOW = 1.25  # requests in the engine, running and waiting, for each sequence it can run
_LOOKAHEAD = 16  # the same, as long as what waits is small: the order is better the more is known
_MAX_WAITING_TOKENS = 1 << 18  # about 10 MiB, with the texts
_MAX_HELD_BYTES = 64 << 20  # carried columns of rows that are not written yet
_MAX_ROWS_A_TURN = 256  # rows read between two engine steps: a call stays short on bad rows

_RowKey = tuple[str, int]  # attempt, ordinal


@dataclass(frozen=True, slots=True)
class FailedLease:
    """A lease that ends without a part of this run: its shard cannot be read, or something else
    stands where the part belongs. Plain text, for the driver."""

    lease: Lease
    message: str


@dataclass(frozen=True, slots=True)
class RunningLease:
    """Rows and tokens of a lease that are finished but not published yet."""

    attempt: str
    shard: int
    counts: Counts


@dataclass(frozen=True, slots=True)
class FinishedLease:
    """A lease that ended with its part in place."""

    lease: Lease
    part: Part


@dataclass(frozen=True, slots=True)
class WorkReport:
    """What one call of :meth:`Pipeline.work` brought.

    ``num_wanted`` is how many further leases would keep the engine full; ``idle`` says that
    nothing is left to do. ``sampled_tokens`` are those of the pipeline so far, of unfinished rows
    too, and ``prefix_tokens`` those of prompts that it did not have to compute. A ``draining``
    pipeline takes no further leases.
    """

    done: tuple[FinishedLease, ...] = ()
    failed: tuple[FailedLease, ...] = ()
    running: tuple[RunningLease, ...] = ()
    num_wanted: int = 0
    idle: bool = True
    sampled_tokens: int = 0
    prefix_tokens: int = 0
    draining: bool = False
    metrics: MetricsDelta = field(default_factory=MetricsDelta)


@dataclass(slots=True)
class _OpenLease:
    """A lease in work: its rows as they are read, its part as it grows."""

    lease: Lease
    reader: ShardReader
    writer: PartWriter
    known: Iterator[Generated | None]
    at_end: bool = False
    counts: Counts = field(default_factory=Counts)
    publishing: Future[Part] | None = None

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


@dataclass(slots=True)
class _OpenRow:
    """A row in the engine, with the samples that are still to come."""

    owner: _OpenLease
    row: Row
    missing: set[int]  # samples that the engine owes
    added_at: float
    started_at: float | None = None  # when a sample was first seen to have a slot
    queued_s: float | None = None
    prefix_tokens: dict[int, int] = field(default_factory=dict)  # of samples
    num_scoring: int = 0  # samples that wait for their verdict
    finished: list[Completion] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return not self.missing and not self.num_scoring


class Pipeline:
    """Keeps one engine busy with the rows of a few leases. Not thread-safe."""

    def __init__(
        self,
        job: Job,
        engine: Engine,
        publish: Callable[[PartFile, Lease], Part],
        schema: InputSchema,
        part_format: PartFormat,
        clock: Callable[[], float] = time.monotonic,
        known: Callable[[Lease], Iterator[Generated | None]] | None = None,
    ) -> None:
        """``publish`` puts a finished part in its place and returns what stands there then.

        ``known`` gives what another run has generated for the samples of a lease, in order; it
        may end early.
        """
        self._job = job
        self._engine = engine
        self._publish = publish
        self._known = known
        self._before = engine.stats()
        self._schema = schema
        self._format = part_format
        self._clock = clock
        self._prompts = PromptBuilder(job)
        if engine.chat is None:
            raise CheckpointError(
                "the checkpoint has no chat template, so rows cannot become prompts",
                "copy tokenizer_config.json or chat_template.jinja from where the model came",
            )
        self._chat = engine.chat
        self._leases: list[_OpenLease] = []
        self._rows: dict[_RowKey, _OpenRow] = {}
        self._recorder = Recorder()
        self.draining = False
        """Set to finish the leases at hand and ask for no more."""
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._judge: Judge | None = None
        if job.evaluate is not None:
            evaluate = job.evaluate
            self._judge = Judge(ScoreSpec(evaluate.scorer, evaluate.pattern, evaluate.choices))
        # Scorers that may take long do so beside the engine.
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._scoring: dict[Future[Verdict], tuple[_OpenRow, Completion]] = {}
        self._window = max(
            engine.max_sequences + 1, math.ceil(_WINDOW * engine.max_sequences), part_format.n
        )
        self._lookahead = max(self._window, _LOOKAHEAD * engine.max_sequences)

    def start(self, lease: Lease) -> None:
        """Take a lease; its rows follow those of the leases before."""
        reader = ShardReader(lease.shard, self._schema, self._job.input.storage_options)
        known = iter(()) if self._known is None else self._known(lease)
        self._leases.append(_OpenLease(lease, reader, PartWriter(reader, self._format), known))

    def work(self, seconds: float) -> WorkReport:
        """Work for about so long, or until a lease has ended, or nothing is left to do.

        Raises what is neither a row's nor a shard's fault: storage, a broken engine.
        """
        started = self._clock()
        until = started + seconds
        done: list[FinishedLease] = []
        failed: list[FailedLease] = []
        while True:
            failed += self._admit()
            if self._engine.num_unfinished:
                self._step()
            self._expire()
            self._take_verdicts(0.0 if self._can_go_on else max(0.0, until - self._clock()))
            self._start_publishing()
            waits = not self._busy and not self._scoring
            timeout_s = max(0.0, until - self._clock()) if waits else 0.0
            self._published(timeout_s, done, failed)
            if done or failed or not self._leases or self._clock() >= until:
                break
        state = "drain" if self.draining else "generate"
        self._recorder.add(WORKER_SECONDS, max(0.0, self._clock() - started), state=state)
        self._gauge()
        stats = self._engine.stats()
        return WorkReport(
            done=tuple(done),
            failed=tuple(failed),
            running=tuple(
                RunningLease(item.lease.attempt, item.lease.shard.number, item.counts)
                for item in self._leases
            ),
            num_wanted=self._num_wanted(),
            idle=not self._leases,
            sampled_tokens=stats.sampled_tokens - self._before.sampled_tokens,
            prefix_tokens=stats.prefix_tokens - self._before.prefix_tokens,
            draining=self.draining,
            metrics=self._recorder.take(),
        )

    def finish(self, timeout_s: float) -> WorkReport:
        """Publish what is complete already, for so long at most, and give up the rest.

        The pipeline is closed then.
        """
        self._start_publishing()
        done: list[FinishedLease] = []
        failed: list[FailedLease] = []
        self._published(timeout_s, done, failed, ALL_COMPLETED)
        self.close()
        return WorkReport(done=tuple(done), failed=tuple(failed))

    def close(self) -> None:
        """Give up everything. May be called twice."""
        for key in list(self._rows):
            self._engine.abort(key)
        self._rows.clear()
        self._publisher.shutdown(wait=False, cancel_futures=True)
        self._scorer.shutdown(wait=False, cancel_futures=True)
        self._scoring.clear()
        if self._judge is not None:
            self._judge.close()
        for item in self._leases:
            item.close()
        self._leases.clear()

    @property
    def _busy(self) -> bool:
        """Whether there is something to do other than waiting for storage."""
        return bool(self._engine.num_unfinished) or any(not item.at_end for item in self._leases)

    @property
    def _can_go_on(self) -> bool:
        """Whether there is something to do while scores are awaited."""
        rows_left = any(not item.at_end for item in self._leases)
        return bool(self._engine.num_unfinished) or (
            rows_left and len(self._scoring) <= self._window
        )

    @property
    def _num_in_engine(self) -> int:
        return self._engine.num_waiting + self._engine.num_running

    def _num_wanted(self) -> int:
        """Leases that would keep the engine full: none while rows are left to read, or while so
        many wait that another worker could need the lease sooner."""
        is_full = self._num_in_engine > self._window
        if self.draining or is_full or any(not item.at_end for item in self._leases):
            return 0
        return max(0, MAX_LEASES - len(self._leases))

    def _has_room(self) -> bool:
        """Whether another row may enter the engine: while it could run dry, and beyond that as
        long as memory stays small."""
        num_requests = self._num_in_engine + self._format.n
        if len(self._scoring) > self._window:
            return False
        if num_requests <= self._window:
            return True
        return (
            num_requests <= self._lookahead
            and self._engine.num_waiting_tokens < _MAX_WAITING_TOKENS
            and sum(item.reader.held_bytes for item in self._leases) < _MAX_HELD_BYTES
        )

    def _admit(self) -> list[FailedLease]:
        """Read rows and put them into the engine, as long as it has room for more."""
        failed: list[FailedLease] = []
        num_read = 0
        for item in list(self._leases):
            while not item.at_end:
                if num_read >= _MAX_ROWS_A_TURN or not self._has_room():
                    return failed
                try:
                    row = next(item.reader, None)
                except ShardError as error:
                    failed.append(self._give_up(item, error))
                    break
                if row is None:
                    item.at_end = True
                else:
                    num_read += 1
                    self._add(item, row)
        return failed

    def _add(self, item: _OpenLease, row: Row) -> None:
        """One row into the engine, or straight to the part when it cannot run."""
        # Taken for every row, whatever becomes of it: they are in the order of the samples.
        known = [next(item.known, None) for _ in range(self._format.n)]
        requests = self._requests(item.lease, row, known)
        if isinstance(requests, RowError):
            failed = [
                self._scored(_failed(row, sample, requests), row.answer)
                for sample in range(self._format.n)
            ]
            for completion in failed:
                item.writer.add(completion)
            item.counts += Counts(rows=1, failed_rows=1, scores=self._scores(failed))
            return
        key = (item.lease.attempt, row.ordinal)
        missing = {request.sample for request in requests}
        self._rows[key] = _OpenRow(item, row, missing, self._clock())
        for request in requests:
            self._engine.add(request)

    def _requests(
        self, lease: Lease, row: Row, known: Sequence[Generated | None]
    ) -> list[Request] | RowError:
        """The samples of a row as requests, or why there are none."""
        prompt = self._prompts.build(row)
        if isinstance(prompt, RowError):
            return prompt
        try:
            encoded = self._chat.encode(
                prompt.messages, reasoning=prompt.reasoning, tools=prompt.tools
            )
            params = SamplingParams(**cast(dict[str, Any], prompt.params))
        except PromptError as error:
            return error.row_error
        except RequestError as error:
            return RowError(ErrorKind.INVALID_PROMPT, error.message)
        refusal = self._engine.admission_error(
            len(encoded.token_ids), params, thinking=encoded.thinking
        )
        if refusal is not None:
            return refusal
        seed = row_seed(params.seed or 0, lease.shard.path, row.index)
        return [
            Request(
                key=(lease.attempt, row.ordinal),
                prompt_token_ids=encoded.token_ids,
                params=params,
                seed=seed,
                sample=sample,
                thinking=encoded.thinking,
                generated=known[sample],
            )
            for sample in range(self._format.n)
        ]

    def _step(self) -> None:
        """One step of the engine, and what it brought."""
        started = self._clock()
        outputs = self._engine.step()
        self._recorder.observe(STEP_SECONDS, self._clock() - started)
        for output in outputs:
            self._take(output)

    def _take(self, output: Output) -> None:
        """A finished sample of the engine."""
        open_row = self._rows.get(cast(_RowKey, output.key))
        if open_row is None:
            return  # its lease was given up or its row timed out at this very step
        open_row.missing.discard(output.sample)
        queued_s = output.timings.queued_s
        if open_row.queued_s is None or queued_s < open_row.queued_s:
            open_row.queued_s = queued_s
        open_row.prefix_tokens[output.sample] = output.prefix_tokens
        completion = _completion(open_row.row, output)
        if self._format.traces and output.error is None:
            completion = replace(completion, generated=output.generated)
        if self._format.tool_calls:
            completion = _with_calls(completion)
        if self._judge is None or self._judge.is_quick or completion.completion is None:
            self._record(open_row, completion)
            return
        open_row.num_scoring += 1
        future = self._scorer.submit(self._judge.judge, completion.completion, open_row.row.answer)
        self._scoring[future] = (open_row, completion)

    def _take_verdicts(self, timeout_s: float) -> None:
        """Samples whose verdict is there go on; waits so long for one to come."""
        if not self._scoring:
            return
        ready, _ = wait(self._scoring, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for future in [item for item in self._scoring if item in ready]:
            open_row, completion = self._scoring.pop(future)
            key = (open_row.owner.lease.attempt, open_row.row.ordinal)
            if self._rows.get(key) is not open_row:
                continue  # its lease was given up
            open_row.num_scoring -= 1
            self._record(open_row, replace(completion, verdict=future.result()))

    def _scored(self, completion: Completion, answer: object) -> Completion:
        """The completion with its verdict, where the job asks for one and it takes no time."""
        if self._judge is None or completion.verdict is not None:
            return completion
        return replace(completion, verdict=self._judge.judge(completion.completion, answer))

    def _scores(self, samples: list[Completion]) -> Scores | None:
        return None if self._judge is None else row_scores(samples)

    def _record(self, open_row: _OpenRow, completion: Completion) -> None:
        owner = open_row.owner
        completion = self._scored(completion, open_row.row.answer)
        owner.writer.add(completion)
        open_row.finished.append(completion)
        owner.counts += Counts(
            prompt_tokens=completion.prompt_tokens,
            reasoning_tokens=completion.reasoning_tokens,
            completion_tokens=completion.completion_tokens,
            thinking_budget_hits=int(completion.thinking_budget_hit),
            malformed_tool_calls=int(
                self._format.tool_calls
                and is_malformed(completion.completion, completion.tool_calls)
            ),
        )
        prefix_tokens = open_row.prefix_tokens.get(completion.sample, 0)
        self._recorder.add(TOKENS, completion.prompt_tokens - prefix_tokens, kind="prompt")
        self._recorder.add(TOKENS, prefix_tokens, kind="prefix_cached")
        self._recorder.add(TOKENS, completion.reasoning_tokens, kind="reasoning")
        self._recorder.add(TOKENS, completion.completion_tokens, kind="completion")
        self._recorder.add(BUDGET_HITS, int(completion.thinking_budget_hit))
        if open_row.is_done:
            samples = sorted(open_row.finished, key=lambda item: item.sample)
            failed = any(item.error is not None for item in samples)
            owner.counts += Counts(rows=1, failed_rows=int(failed), scores=self._scores(samples))
            self._rows.pop((owner.lease.attempt, open_row.row.ordinal), None)
            seconds = self._clock() - open_row.added_at - (open_row.queued_s or 0.0)
            self._recorder.observe(ROW_SECONDS, max(0.0, seconds))

    def _gauge(self) -> None:
        stats = self._engine.stats()
        self._recorder.set(ROWS_IN_FLIGHT, len(self._rows))
        self._recorder.set(SLOTS_USED, stats.slots_used)
        self._recorder.set(SLOTS_TOTAL, stats.slots_total)
        self._recorder.set(KV_PAGES_USED, stats.blocks_used)
        self._recorder.set(KV_PAGES_TOTAL, stats.blocks_total)

    def _expire(self) -> None:
        """Rows that took too long become error rows; samples they already have are kept.

        The time in the queue is not the row's.
        """
        limit = self._job.errors.row_timeout_s
        if limit is None:
            return
        now = self._clock()
        late: list[tuple[_RowKey, _OpenRow]] = []
        for key, open_row in self._rows.items():
            if open_row.started_at is None:
                open_row.started_at = now if self._engine.is_running(key) else None
            elif open_row.missing and now - open_row.started_at > limit:
                late.append((key, open_row))
        for key, open_row in late:
            self._engine.abort(key)
            error = RowError(ErrorKind.TIMEOUT, f"not finished within {limit:g} s")
            for sample in sorted(open_row.missing):
                open_row.missing.discard(sample)
                self._record(open_row, _failed(open_row.row, sample, error))

    def _give_up(self, item: _OpenLease, error: ShardError) -> FailedLease:
        """Drop a lease whose shard cannot be read, with all its rows."""
        for key in [key for key, open_row in self._rows.items() if open_row.owner is item]:
            self._engine.abort(key)
            del self._rows[key]
        self._leases.remove(item)
        item.close()
        hint = f" ({error.hint})" if error.hint else ""
        return FailedLease(item.lease, error.message + hint)

    def _start_publishing(self) -> None:
        for item in self._leases:
            if item.at_end and item.publishing is None and item.writer.is_complete:
                item.publishing = self._publisher.submit(self._finish_part, item)

    def _finish_part(self, item: _OpenLease) -> Part:
        """Close, verify and publish a part; runs beside the engine."""
        return self._publish(item.writer.finish(), item.lease)

    def _published(
        self,
        timeout_s: float,
        done: list[FinishedLease],
        failed: list[FailedLease],
        until: str = FIRST_COMPLETED,
    ) -> None:
        """Move the leases whose publishing ended to ``done``, or to ``failed`` when something
        else stands where the part belongs; waits so long for one to end."""
        waiting = {item.publishing: item for item in self._leases if item.publishing is not None}
        ready, _ = wait(waiting, timeout=timeout_s, return_when=until)
        for future in ready:
            item = waiting[future]
            try:
                done.append(FinishedLease(item.lease, future.result()))
            except ShardError as error:
                failed.append(self._give_up(item, error))
            else:
                self._leases.remove(item)
                item.close()


def row_seed(job_seed: int, shard_path: str, row_index: int) -> int:
    """The seed of a row: 63 bits that depend on the job's seed, the file and the row alone."""
    text = f"{job_seed}\0{row_index}\0{shard_path}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _completion(row: Row, output: Output) -> Completion:
    if output.error is not None:
        return _failed(row, output.sample, output.error, output.prompt_tokens)
    return Completion(
        ordinal=row.ordinal,
        sample=output.sample,
        id=row.id,
        completion=output.text,
        reasoning=output.reasoning,
        finish_reason=output.finish_reason,
        prompt_tokens=output.prompt_tokens,
        reasoning_tokens=output.num_reasoning_tokens,
        completion_tokens=output.num_completion_tokens,
        thinking_budget_hit=output.thinking_budget_hit,
        logprobs=output.logprobs,
    )


def _with_calls(completion: Completion) -> Completion:
    """The completion with its tool calls taken out of the text, where it has any."""
    if completion.completion is None:
        return completion
    reply = parse_calls(completion.completion)
    if reply.calls is None:
        return completion
    return replace(
        completion,
        completion=reply.text,
        tool_calls=reply.calls,
        finish_reason=FinishReason.TOOL_CALLS,
    )


def _failed(row: Row, sample: int, error: RowError, prompt_tokens: int = 0) -> Completion:
    return Completion(
        ordinal=row.ordinal,
        sample=sample,
        id=row.id,
        completion=None,
        reasoning=None,
        finish_reason=FinishReason.ERROR,
        prompt_tokens=prompt_tokens,
        error=str(error),
    )
