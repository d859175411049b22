"""The run lock: who holds it, who may take it, and when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.data.cancel import is_cancel_requested, request_cancel
from batchrun.data.layout import LOCK, epoch_path
from batchrun.data.lock import Holder, LockState, RunLock, is_live, read_lock
from batchrun.data.store import Store
from batchrun.errors import OutputError, OutputHeldError
from tests.conftest import S3Server

ELSEWHERE = Holder("otherhost", "other-boot", 77, "123", "2024-01-01T00:00:00+00:00")


class Clock:
    """Time that passes only by sleeping; ``on_sleep`` runs at each sleep."""

    def __init__(self, on_sleep: Callable[[int], None] = lambda _: None) -> None:
        self.now = 0.0
        self.num_sleeps = 0
        self.on_sleep = on_sleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.num_sleeps += 1
        self.on_sleep(self.num_sleeps)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty output."""
    return Store.open(str(tmp_path))


def lock_of(store: Store, clock: Clock | None = None, **options: float) -> RunLock:
    """A lock with a clock of its own."""
    clock = clock or Clock()
    return RunLock(store, "run", clock=clock, sleep=clock.sleep, **options)


def put_lock(store: Store, **changes: object) -> LockState:
    """A lock of somebody elsewhere."""
    state = replace(LockState(3, 10, False, ELSEWHERE), **changes)  # type: ignore[arg-type]
    store.put(LOCK, state.to_bytes())
    return state


def test_a_free_output_is_taken_at_once(store: Store) -> None:
    """The first driver has epoch 1 and stands in the lock; released, the next has epoch 2."""
    clock = Clock()
    with lock_of(store, clock) as lock:
        seen = read_lock(store)
        assert seen is not None
        assert (1, 1, False, os.getpid()) == (
            lock.epoch,
            seen.epoch,
            seen.released,
            seen.holder.pid,
        )
        assert is_live(store)
    assert not is_live(store)
    with lock_of(store, clock) as lock:
        assert lock.epoch == 2
    assert clock.num_sleeps == 0


def test_the_lock_in_object_storage(s3_server: S3Server) -> None:
    """The same on S3: held, seen to be alive, released, taken again."""
    remote = Store.open(f"{s3_server.url}/out", s3_server.storage_options)
    with lock_of(remote, beat_s=0.05):
        clock = Clock(lambda _: time.sleep(0.06))
        with pytest.raises(OutputHeldError, match=f"process {os.getpid()}"):
            lock_of(remote, clock).acquire()
    with lock_of(remote) as lock:
        assert lock.epoch == 2


def test_a_living_holder_is_named(store: Store) -> None:
    """A counter that moves means exit 4, with host, process and since when."""
    put_lock(store)
    clock = Clock(lambda sleeps: sleeps == 9 and put_lock(store, counter=11))  # type: ignore[arg-type, return-value]
    with pytest.raises(OutputHeldError, match="process 77 on otherhost, since 2024-01-01") as held:
        lock_of(store, clock).acquire()
    assert (held.value.exit_code, clock.now) == (4, 4.5)
    seen = read_lock(store)
    assert seen is not None and seen.counter == 11
    assert store.info(epoch_path("run", 4)) is None


def test_a_silent_holder_is_followed_after_20_seconds(store: Store) -> None:
    """A counter that stands still on our own clock for 20 s: taken over with the next epoch."""
    put_lock(store)
    clock = Clock()
    with lock_of(store, clock) as lock:
        assert (lock.epoch, clock.now) == (4, 20.0)


def test_a_holder_that_releases_while_it_is_watched_is_followed(store: Store) -> None:
    """No need to wait longer."""
    put_lock(store)
    clock = Clock(lambda sleeps: sleeps == 3 and put_lock(store, released=True))  # type: ignore[arg-type, return-value]
    with lock_of(store, clock) as lock:
        assert (lock.epoch, clock.now) == (4, 1.5)


def test_a_process_of_this_machine_that_is_gone_is_followed_at_once(store: Store) -> None:
    """After a SIGKILL of the driver the next submit begins without waiting."""
    code = "from batchrun.data.lock import *; from dataclasses import asdict; import json\n"
    code += "print(json.dumps(asdict(Holder.this_process())))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    dead = Holder(**json.loads(out.stdout))
    assert dead.is_gone and not dead.is_here
    put_lock(store, holder=dead)
    assert not is_live(store)
    clock = Clock()
    with lock_of(store, clock) as lock:
        assert (lock.epoch, clock.num_sleeps) == (4, 0)


def test_a_reused_process_number_is_not_the_holder(store: Store) -> None:
    """A pid counts only with the start time of its process."""
    mine = Holder.this_process()
    assert mine.is_here and not mine.is_gone
    assert replace(mine, process_started="1").is_gone
    assert not replace(mine, host="other").is_gone
    assert not replace(mine, machine="other").is_gone


def test_of_two_that_follow_one_wins(store: Store) -> None:
    """The record of the epoch is create-only: the slower one is told that it is held."""
    put_lock(store, released=True)
    slow = lock_of(store)
    put_if_absent = store.put_if_absent

    def overtaken(path: str, data: bytes, token: str) -> bool:
        put_if_absent(path, b"{}", "the faster one")
        return put_if_absent(path, data, token)

    store.put_if_absent = overtaken  # type: ignore[method-assign, assignment]
    with pytest.raises(OutputHeldError, match="another live run"):
        slow.acquire()


def test_of_two_jobs_that_begin_in_one_empty_output_one_wins(store: Store) -> None:
    """Their runs count epochs apart; the lock itself decides, before anything is planned."""
    clock = Clock()
    slow = RunLock(store, "other", clock=clock, sleep=clock.sleep)
    fast: list[RunLock] = []
    writers = {name: getattr(store, name) for name in ("put", "put_if_absent")}

    def overtaken(name: str) -> Callable[..., object]:
        def write(path: str, *args: object) -> object:
            if path == LOCK and not fast:
                fast.append(lock_of(store))
                fast[0].acquire()
            return writers[name](path, *args)

        return write

    for name in writers:
        setattr(store, name, overtaken(name))
    with pytest.raises(OutputHeldError, match="another live run"):
        slow.acquire()
    seen = read_lock(store)
    assert seen is not None and not seen.released and not fast[0].lost.is_set()
    fast[0].release()


def test_an_equal_number_of_another_holder_is_no_own_lock(store: Store) -> None:
    """A holder whose object was written over by another one learns it with the next beat."""
    with lock_of(store, beat_s=0.01) as lock:
        put_lock(store, epoch=lock.epoch)
        assert lock.lost.wait(5)


def test_a_lock_beats_on_after_an_error_of_any_kind(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No surprise of a library ends the thread: a silent lock would let a second driver in."""
    failing = iter([True])
    put = store.put

    def put_or_fail(path: str, data: bytes) -> None:
        if path == LOCK and next(failing, False):
            raise RuntimeError("surprise")
        put(path, data)

    with lock_of(store, beat_s=0.01) as lock:
        monkeypatch.setattr(store, "put", put_or_fail)
        deadline = time.monotonic() + 5
        while (state := read_lock(store)) is not None and state.counter < 3:
            assert time.monotonic() < deadline and not lock.lost.is_set()
            time.sleep(0.01)


def test_an_epoch_whose_taker_died_before_the_lock_is_passed_over(store: Store) -> None:
    """Epochs are never given twice."""
    put_lock(store, released=True)
    store.put(epoch_path("run", 9), b"{}")
    with lock_of(store) as lock:
        assert lock.epoch == 10


def test_a_holder_that_was_followed_learns_it_and_keeps_off(store: Store) -> None:
    """An old driver that wakes up does not take the lock back."""
    lock = lock_of(store, beat_s=0.01).acquire()
    lock.check()
    for _ in range(500):
        # As the new holder beats too: one beat may be overwritten by the old one's last.
        put_lock(store, epoch=99)
        if lock.lost.wait(0.05):
            break
    assert lock.lost.is_set()
    put_lock(store, epoch=99)
    with pytest.raises(OutputHeldError, match="took over"):
        lock.check()
    lock.release()
    seen = read_lock(store)
    assert seen is not None and (seen.epoch, seen.released) == (99, False)


def test_a_holder_that_stood_still_replaces_nothing(store: Store) -> None:
    """Whoever is about to replace something asks the store whether the lock is still its own."""
    with RunLock(store, "run", beat_s=60) as slow:
        slow.confirm()
        with RunLock(store, "run", sleep=lambda _: None, expiry_s=0.0):
            slow.check()
            with pytest.raises(OutputHeldError, match="another run took over"):
                slow.confirm()


def test_a_holder_whose_run_was_discarded_leaves_the_output_to_others(store: Store) -> None:
    """A driver that stood still meanwhile: neither an empty output nor one in which somebody began
    anew, under a lower number, is its own any more."""
    lock_of(store).acquire().release()
    old = lock_of(store, beat_s=60).acquire()
    assert old.epoch == 2
    store.delete([item.path for item in store.list()])
    with pytest.raises(OutputHeldError, match="or its run was discarded"):
        old.confirm()
    with lock_of(store, beat_s=60) as new:
        old.lost.clear()
        with pytest.raises(OutputHeldError, match="or its run was discarded"):
            old.confirm()
        old.lost.clear()
        old.release()
        new.confirm()
    seen = read_lock(store)
    assert seen is not None and (seen.epoch, seen.released) == (1, True)


def test_a_lower_number_in_the_lock_is_overwritten(store: Store) -> None:
    """It is the last word of a driver that stood still while this one took over."""
    put_lock(store, released=True)
    with lock_of(store, beat_s=60) as lock:
        put_lock(store, epoch=3)
        lock.confirm()
    seen = read_lock(store)
    assert seen is not None and (seen.epoch, seen.released) == (4, True)


def test_the_holder_beats(store: Store) -> None:
    """The counter moves by itself until the release."""
    with lock_of(store, beat_s=0.01):
        deadline = time.monotonic() + 5
        while (seen := read_lock(store)) is None or seen.counter < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    seen = read_lock(store)
    assert seen is not None and seen.released


def test_liveness_of_a_holder_elsewhere_is_seen_by_its_counter(store: Store) -> None:
    """It moves: live. It stands still, or there is none: not."""
    assert not is_live(store)
    put_lock(store)
    still = Clock()
    assert not is_live(store, clock=still, sleep=still.sleep)
    for seconds in (1, 19):  # a beat is late where storage is slow
        put_lock(store)
        moving = Clock(lambda sleeps, at=2 * seconds: sleeps == at and put_lock(store, counter=12))  # type: ignore[misc]
        assert is_live(store, clock=moving, sleep=moving.sleep)


def test_an_object_that_is_no_lock_is_refused(store: Store) -> None:
    """Damage is told, not overwritten."""
    for data in (b"", b"[]", b"{}", b'{"holder": 3}', b"\xff"):
        store.put(LOCK, data)
        with pytest.raises(OutputError, match="is not a lock"):
            lock_of(store).acquire()


def test_a_request_to_stop_reaches_the_holder_with_its_next_beat(store: Store) -> None:
    """Whoever can write the output can ask its run to stop."""
    with lock_of(store, beat_s=0.01) as lock:
        assert not lock.cancelled.wait(0.05)
        request_cancel(store, "another")
        assert not lock.cancelled.wait(0.05)
        request_cancel(store, "run")
        assert lock.cancelled.wait(5)


def test_a_request_to_stop_does_not_outlive_its_driver(store: Store) -> None:
    """The next submit is not stopped by what was meant for the one before."""
    request_cancel(store, "run")
    with lock_of(store, beat_s=0.01) as lock:
        assert not lock.cancelled.wait(0.1)
    assert not is_cancel_requested(store, "run")
