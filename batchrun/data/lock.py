"""The lock that keeps two drivers from one output.

It saves work; safety comes from create-only puts. No wall clocks are compared: a holder shows
that it lives by moving a counter, and whoever waits watches it on a clock of its own.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from batchrun.data.cancel import clear_cancel, is_cancel_requested
from batchrun.data.layout import LOCK, epoch_path, epochs_folder
from batchrun.data.store import Store
from batchrun.errors import BatchrunError, OutputError, OutputHeldError

_log = logging.getLogger(__name__)

BEAT_S = 5.0
EXPIRY_S = 20.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock. ``machine`` tells hosts, boots and containers apart."""

    host: str
    machine: str
    pid: int
    process_started: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """The process that runs this."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _process_started(pid), now)

    @property
    def is_gone(self) -> bool:
        """Whether the process certainly ended: it is of this machine and no longer there."""
        here = self.machine == _machine() and self.host == socket.gethostname()
        return here and _process_started(self.pid) != self.process_started

    @property
    def is_here(self) -> bool:
        """Whether the process is of this machine and alive."""
        here = self.machine == _machine() and self.host == socket.gethostname()
        return here and not self.is_gone


@dataclass(frozen=True, slots=True)
class LockState:
    """What the lock object says."""

    epoch: int
    counter: int
    released: bool
    holder: Holder

    def to_bytes(self) -> bytes:
        """The lock object's content."""
        return json.dumps(asdict(self), indent=1).encode()


def read_lock(store: Store) -> LockState | None:
    """The lock of an output, or None where there is none."""
    data = store.read(LOCK)
    if data is None:
        return None
    try:
        raw = json.loads(data)
        holder = Holder(**raw.pop("holder"))
        return LockState(**raw, holder=holder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"output: {store.url}/{LOCK} is not a lock of batchrun ({error})", "remove it"
        ) from error


def is_live(
    store: Store,
    *,
    watch_s: float = EXPIRY_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether a driver holds the output and lives. Watches a holder elsewhere for ``watch_s``; one
    whose storage is slow may take much longer than :data:`BEAT_S` from beat to beat."""
    seen = read_lock(store)
    if seen is None or seen.released or seen.holder.is_gone:
        return False
    if seen.holder.is_here:
        return True
    start = clock()
    while clock() - start < watch_s:
        sleep(_POLL_S)
        now = read_lock(store)
        if now != seen:
            return now is not None and not now.released
    return False


class RunLock:
    """The lock of one output, held by this process under a number of its own, the epoch.

    A thread beats the counter until :meth:`release`. ``lost`` is set when another driver took
    over or the run was discarded, which happens only when this one seemed dead for long;
    ``cancelled`` when somebody asked the run to stop (:mod:`batchrun.data.cancel`).
    """

    def __init__(
        self,
        store: Store,
        run: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        beat_s: float = BEAT_S,
        expiry_s: float = EXPIRY_S,
    ) -> None:
        self._store = store
        self._run = run
        self._clock = clock
        self._sleep = sleep
        self._beat_s = beat_s
        self._expiry_s = expiry_s
        self._state = LockState(0, 0, False, Holder.this_process())
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = threading.Event()
        self.cancelled = threading.Event()

    @property
    def epoch(self) -> int:
        """The number of this driver among the drivers of the run, from 1."""
        return self._state.epoch

    def acquire(self) -> RunLock:
        """Take the lock and begin to beat.

        Raises :class:`~batchrun.errors.OutputHeldError` naming the holder when another driver
        lives. A holder on this machine whose process is gone is followed at once, another one
        after its counter stood still for ``expiry_s``.
        """
        seen = read_lock(self._store)
        if seen is not None and not seen.released and not seen.holder.is_gone:
            self._watch(seen)
        seen_epoch = 0 if seen is None else seen.epoch
        self._claim(seen_epoch)
        if seen is None:
            # Two jobs that begin in one empty output count their epochs apart: the first lock is
            # create-only, and whoever made it has the output.
            if not self._store.put_if_absent(LOCK, self._state.to_bytes(), uuid.uuid4().hex):
                raise _held(self._store, None)
        elif self._someone_is_between(seen_epoch):
            raise _held(self._store, None)  # who wrote the lock while the number was taken
        else:
            self._store.put(LOCK, self._state.to_bytes())
        clear_cancel(self._store, self._run)
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Stop beating and let the next driver in at once. May be called twice."""
        self._ended.set()
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if not self.lost.is_set() and self._is_ours():
            self._state = replace(self._state, released=True)
            self._store.put(LOCK, self._state.to_bytes())

    def check(self) -> None:
        """Raise :class:`~batchrun.errors.OutputHeldError` if another driver took over."""
        if self.lost.is_set():
            raise OutputHeldError(
                f"another run took over {self._store.url}, or its run was discarded",
                "this one was silent for too long; what was taken over is kept",
            )

    def confirm(self) -> None:
        """:meth:`check` by asking the store, for who is about to replace something: after a process
        stood still it takes a beat until ``lost`` is set."""
        if not self._is_ours():
            self.lost.set()
        self.check()

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _watch(self, seen: LockState) -> None:
        """Return when the holder's counter stood still long enough; raise when it moves."""
        start = self._clock()
        while self._clock() - start < self._expiry_s:
            self._sleep(_POLL_S)
            now = read_lock(self._store)
            if now is None or now.released:
                return
            if (now.epoch, now.counter) != (seen.epoch, seen.counter):
                raise _held(self._store, now.holder)
            if now.holder.is_gone:
                return

    def _claim(self, seen_epoch: int) -> None:
        """Take the next epoch; its create-only record decides between several takers."""
        last = max(
            (int(item.path[-11:-5]) for item in self._store.list(epochs_folder(self._run))),
            default=0,
        )
        if last > seen_epoch and self._someone_is_between(seen_epoch):
            holder = read_lock(self._store)
            raise _held(self._store, None if holder is None else holder.holder)
        epoch = max(last, seen_epoch) + 1
        self._state = replace(self._state, epoch=epoch, counter=0)
        record = json.dumps({"epoch": epoch, "holder": asdict(self._state.holder)}, indent=1)
        if not self._store.put_if_absent(
            epoch_path(self._run, epoch), record.encode(), uuid.uuid4().hex
        ):
            raise _held(self._store, None)

    def _someone_is_between(self, seen_epoch: int) -> bool:
        """Whether another taker, who has its epoch already, has now written the lock too."""
        now = read_lock(self._store)
        return now is not None and now.epoch > seen_epoch and not now.released

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                if not self._is_ours():
                    self.lost.set()
                    return
                self._state = replace(self._state, counter=self._state.counter + 1)
                self._store.put(LOCK, self._state.to_bytes())
                if is_cancel_requested(self._store, self._run):
                    self.cancelled.set()
            except Exception as error:
                # Storage is away. The run itself decides how long to bear that; when it is back,
                # the next beat shows whether somebody took over. Whatever else it is, a lock
                # that falls silent would let a second driver in beside this one.
                if not isinstance(error, BatchrunError):
                    _log.warning("a beat of the run lock failed: %s", error)
                continue

    def _is_ours(self) -> bool:
        """Whether nobody took over, nor discarded the run: whoever begins in its output after that
        counts epochs from 1. A lower one is otherwise the last beat of a driver before this one."""
        now, own = read_lock(self._store), self._state
        if now is not None and now.epoch >= own.epoch:
            if (now.epoch, now.holder) != (own.epoch, own.holder):
                return False
        return self._store.info(epoch_path(self._run, own.epoch)) is not None


def _held(store: Store, holder: Holder | None) -> OutputHeldError:
    who = (
        "just now"
        if holder is None
        else f"by process {holder.pid} on {holder.host}, since {holder.since}"
    )
    return OutputHeldError(
        f"another live run holds {store.url} ({who})", "wait until it ends, or stop it"
    )


def _machine() -> str:
    """What tells this kernel, since its boot, and this container from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return f"{boot}/{space}"


def _process_started(pid: int) -> str:
    """The start of a process in clock ticks since boot; "" when there is no such process.

    Tells a process from a later one of the same number. A zombie counts as gone.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        return _without_proc(pid)
    # The second field is the command in brackets and may hold spaces and brackets itself.
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in {"Z", "X"} else fields[19]


def _without_proc(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
