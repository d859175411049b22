"""Deleting the journals of published shards, beside the run: nothing ever waits for it."""

from __future__ import annotations

import logging
import threading

from batchrun.data.journal import delete_journal
from batchrun.data.layout import journal_folder
from batchrun.data.store import Store
from batchrun.errors import BatchrunError

_EVERY_S = 15.0

_log = logging.getLogger(__name__)


class JournalSweeper:
    """A thread of the driver. What it could not delete goes when the run ends."""

    def __init__(self, store: Store, run: str, *, every_s: float = _EVERY_S) -> None:
        self._store = store
        self._run = run
        self._every_s = every_s
        self._published: set[int] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sweep, name="journal-sweeper", daemon=True)
        self._thread.start()

    def published(self, shard: int) -> None:
        """The shard's part is in its place: nobody needs its journal any more."""
        with self._lock:
            self._published.add(shard)

    def close(self) -> None:
        """Stop; a request that is under way is waited for. May be called twice."""
        self._ended.set()
        self._thread.join()

    def _sweep(self) -> None:
        while not self._ended.wait(self._every_s):
            with self._lock:
                numbers, self._published = self._published, set()
            if not numbers:
                continue
            try:
                # Most shards never had a journal: one listing tells.
                found = self._store.folders(journal_folder(self._run))
                present = {int(name) for name in found if name.isdecimal()}
                delete_journal(self._store, self._run, sorted(numbers & present))
            except BatchrunError as error:
                _log.info("the journals of %d shards are still there: %s", len(numbers), error)
                with self._lock:
                    self._published |= numbers
