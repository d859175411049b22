"""Parts and journals on their way to storage, in threads beside the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from batchrun.data.journal import Journal
from batchrun.data.writer import PartFile
from batchrun.engine.engine import RunningSample
from batchrun.errors import BatchrunError, ShardError
from batchrun.leases import Journals, LeaseJournal, OpenLease
from batchrun.metrics import CHECKPOINT_SECONDS, Recorder
from batchrun.records import Lease, Part
from batchrun.reports import FinishedLease
from batchrun.worklog import log_flush_failed, log_flushed, log_gone

Running = Callable[[OpenLease], list[RunningSample]]
"""What the engine is at for a lease."""


class Saving:
    """Makes safe what leases have: the parts of those that are whole, the journals of all."""

    def __init__(
        self,
        publish: Callable[[PartFile, Lease], Part],
        journals: Journals | None,
        interval_s: float,
        recorder: Recorder,
        clock: Callable[[], float],
    ) -> None:
        """``publish`` and ``journals`` as for the pipeline; a journal is written every
        ``interval_s`` seconds of ``clock``."""
        self._publish = publish
        self._journals = journals
        self._interval_s = interval_s
        self._recorder = recorder
        self._clock = clock
        self._writers: dict[str, LeaseJournal] = {}  # by attempt
        # Two, so that no part that takes long holds up a journal.
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="open")

    def open(self, lease: Lease) -> Future[Journal]:
        """Begin to read the journal of a lease's shard, and to write that of the lease."""
        if self._journals is None:
            opening: Future[Journal] = Future()
            opening.set_result(Journal())
            return opening
        self._writers[lease.attempt] = self._journals.write(lease)
        return self._opener.submit(self._journals.read, lease.shard)

    def forget(self, lease: Lease) -> None:
        """Nothing more of a lease is to be made safe."""
        self._writers.pop(lease.attempt, None)

    def flush_due(self, leases: Iterable[OpenLease], running: Running) -> None:
        """Send to the journal what has waited for long enough."""
        if self._journals is None:
            return
        now = self._clock()
        for item in leases:
            if item.is_due(now, self._interval_s):
                self._flush(item, running)

    def publish_complete(self, leases: Iterable[OpenLease]) -> None:
        """Make parts of whole leases that have all their rows."""
        for item in leases:
            if item.lease.whole and item.publishing is None and item.has_all_rows:
                item.publishing = self._publisher.submit(self._finish_part, item)

    @staticmethod
    def pending(leases: Iterable[OpenLease]) -> list[Future[Any]]:
        """What is on its way to storage and waited for: of each lease its journal first."""
        first = (item.flushing or item.publishing for item in leases)
        return [future for future in first if future is not None]

    def settle(self, item: OpenLease) -> FinishedLease | None:
        """Take note of what storage has done for a lease; the lease when all of it is safe.

        Raises StorageError and OutputError, and ShardError when something else stands where its
        part belongs.
        """
        if item.flushing is not None and item.flushing.done():
            self._end_flush(item)
        if item.publishing is not None and item.publishing.done() and item.flushing is None:
            # Nothing of its journal comes after its part, when the journal is deleted.
            return item.finished(item.publishing.result())
        if not item.lease.whole and item.is_safe:
            return item.finished()
        return None

    def begin_last(self, leases: Iterable[OpenLease], running: Running, until: float) -> None:
        """Publish what is complete and journal everything else, before the work ends; a write to
        the journal that is under way is waited for until then."""
        self.publish_complete(leases)
        for item in leases:
            if item.publishing is not None or self._journals is None:
                continue
            if item.flushing is not None:
                wait([item.flushing], timeout=max(0.0, until - self._clock()))
                if not item.flushing.done():
                    continue
                with suppress(BatchrunError):  # the next one brings the same again
                    self._end_flush(item)
            self._flush(item, running)

    def settle_last(self, item: OpenLease, running: Running) -> FinishedLease | None:
        """As :meth:`settle`, but what storage does not take is lost, which costs the other leases
        nothing. A part that cannot be published goes to the journal. Raises ShardError alone."""
        try:
            return self.settle(item)
        except ShardError:
            raise
        except BatchrunError as error:
            log_gone(item.lease, "lease_not_saved", error.message)
            part = item.publishing
            if part is not None and part.done() and part.exception() is not None:
                item.publishing = None
                if item.flushing is None and self._journals is not None:
                    self._flush(item, running)
            return None

    def wait(self, leases: Iterable[OpenLease], timeout_s: float) -> bool:
        """Wait so long for storage to do something; False when nothing is on its way."""
        pending = self.pending(leases)
        if pending:
            wait(pending, timeout=timeout_s, return_when=FIRST_COMPLETED)
        return bool(pending)

    def close(self) -> None:
        """Begin with nothing more. May be called twice."""
        for executor in (self._publisher, self._flusher, self._opener):
            executor.shutdown(wait=False, cancel_futures=True)

    def _finish_part(self, item: OpenLease) -> Part:
        """Close, verify and publish a part; in the thread."""
        return self._publish(item.finish_part(), item.lease)

    def _flush(self, item: OpenLease, running: Running) -> None:
        writer = self._writers[item.lease.attempt]
        item.start_flush(writer, running(item), self._flusher, self._clock())

    def _end_flush(self, item: OpenLease) -> None:
        started_at = item.end_flush()
        if started_at is None:
            log_flush_failed(item.lease)
            return
        seconds = max(0.0, self._clock() - started_at)
        self._recorder.observe(CHECKPOINT_SECONDS, seconds)
        log_flushed(item.lease, item.state.saved, seconds)
