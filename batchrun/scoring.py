"""Verdicts on finished samples: at once where they take no time, else in a thread beside the
engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from batchrun.evaluate import ScoreSpec
from batchrun.job import Evaluate
from batchrun.judge import Judge
from batchrun.leases import OpenRow
from batchrun.records import Completion, Row
from batchrun.scores import Verdict


class Scoring:
    """Scores the samples of a job, or none where the job does not ask for it."""

    def __init__(self, evaluate: Evaluate | None) -> None:
        """Raises BatchrunError when the library that the scorer needs is missing."""
        self._judge: Judge | None = None
        if evaluate is not None:
            self._judge = Judge(ScoreSpec(evaluate.scorer, evaluate.pattern, evaluate.choices))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._waiting: dict[Future[Verdict], tuple[OpenRow, Completion]] = {}

    def __len__(self) -> int:
        """Samples that wait for their verdict."""
        return len(self._waiting)

    def takes_time(self, completion: Completion) -> bool:
        """Whether the verdict on a sample is to be had from :meth:`start` alone."""
        return (
            self._judge is not None
            and not self._judge.is_quick
            and completion.verdict is None
            and completion.completion is not None
        )

    def scored(self, completion: Completion, answer: object) -> Completion:
        """The sample with its verdict, where the job asks for one that takes no time."""
        if self._judge is None or completion.verdict is not None:
            return completion
        return replace(completion, verdict=self._judge.judge(completion.completion, answer))

    def start(self, open_row: OpenRow, completion: Completion) -> None:
        """Begin with the verdict on a sample of ``open_row``."""
        open_row.num_scoring += 1
        future = self._thread.submit(self._verdict, completion, open_row.row)
        self._waiting[future] = (open_row, completion)

    def wait_for(self, completion: Completion, row: Row) -> Completion:
        """The sample with a verdict that takes time; returns when it is there."""
        return replace(
            completion, verdict=self._thread.submit(self._verdict, completion, row).result()
        )

    def take(self, timeout_s: float) -> Iterator[tuple[OpenRow, Completion]]:
        """Samples whose verdict has come; waits so long for one. Each is to be taken in before the
        next: a row is done with the last of its samples."""
        if not self._waiting:
            return
        ready, _ = wait(self._waiting, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for future in [item for item in self._waiting if item in ready]:
            open_row, completion = self._waiting.pop(future)
            open_row.num_scoring -= 1
            yield open_row, replace(completion, verdict=future.result())

    def close(self) -> None:
        """Give up what waits. May be called twice."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._waiting.clear()
        if self._judge is not None:
            self._judge.close()

    def _verdict(self, completion: Completion, row: Row) -> Verdict:
        """In the scorer's thread."""
        assert self._judge is not None
        return self._judge.judge(completion.completion, row.answer)
