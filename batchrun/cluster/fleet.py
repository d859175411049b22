"""The workers of a run as Ray actors: started, given leases, asked for news, given up.

Each worker has at most one call in flight, so a worker that is lost, stuck or finished is always
one call that failed, did not come back, or came back. Of a worker that is lost or stuck, a task on
its machine then tells which rows it had in its engine and where it stood; only then is it news.
Restarts are the coordinator's business: Ray restarts nothing here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchrun.cluster.capacity import WorkerShape
from batchrun.cluster.remains import Remains, look
from batchrun.cluster.session import draining_nodes
from batchrun.cluster.worker import Loaded, Worker, WorkerSettings
from batchrun.errors import BatchrunError, OutputError, StorageError
from batchrun.events import LossCause
from batchrun.records import Lease
from batchrun.reports import DRAIN_S, WorkReport

WORK_S = 1.0
"""How long one call of a worker lasts; a lease reaches a busy worker within this time."""

_LOOK_S = 15.0  # for a task on another machine to look at what a worker left there
_ASK_DRAINING_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class WorkerLoaded:
    """A worker has loaded its model, ``waited_s`` after it was asked for."""

    worker: str
    loaded: Loaded
    waited_s: float


@dataclass(frozen=True, slots=True)
class WorkerReported:
    """A call of a worker came back; before it, the worker was without work for ``starved_s``."""

    worker: str
    report: WorkReport
    starved_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """A worker is gone or was given up. ``error`` is set when it said why. ``in_flight`` are the
    rows that it had in its engine, None when nobody can tell; ``stacks`` is where it stood."""

    worker: str
    cause: LossCause
    message: str
    node_lived: bool
    error: BatchrunError | None = None
    in_flight: tuple[tuple[int, int], ...] | None = None
    stacks: str = ""


News = WorkerLoaded | WorkerReported | WorkerGone


@dataclass(slots=True)
class _Member:
    """One worker as the driver sees it."""

    actor: Any
    asked_at: float
    call: Any = None  # the ObjectRef of the call in flight
    called_at: float = 0.0
    loaded: Loaded | None = None
    draining: bool = False
    queue: list[Lease] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    gone: WorkerGone | None = None  # the news, while the call in flight looks at the remains
    idle_since: float | None = None
    starved_s: float = 0.0

    @property
    def is_spare(self) -> bool:
        """Whether it is whole and has nothing to do."""
        return (
            self.loaded is not None
            and self.call is None
            and not self.queue
            and not self.draining
            and self.gone is None
        )


def _exit_detail(text: str) -> str:
    """What Ray says of an actor's death, without its ids and its list of common causes."""
    text = " ".join(text.split())
    found = re.search(r"Worker exit detail: (.+?)(?: Some common causes|$)", text)
    return (text if found is None else found[1])[:300]


def end_actor(actor: Any) -> None:
    """End a worker's process."""
    if ray.is_initialized():  # else Ray died, and its actors with it
        ray.kill(actor, no_restart=True)


class Fleet:
    """The workers, by the names that the coordinator gave them."""

    def __init__(
        self,
        settings: WorkerSettings,
        shape: WorkerShape,
        hang_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        spares: list[Any] | None = None,
    ) -> None:
        """``spares`` are idle actors of an earlier fleet with the same model and shape: they are
        taken before new ones are started, and workers that are stopped while idle go there."""
        self._spares = spares
        self._settings = settings
        self._hang_timeout_s = hang_timeout_s
        self._clock = clock
        self._members: dict[str, _Member] = {}
        self._asked_draining_at = clock()
        remote: Any = ray.remote
        self._look: Any = remote(num_cpus=0, max_retries=0)(look)
        self._actor: Any = ray.remote(Worker)
        self._options: dict[str, Any] = {
            "num_cpus": shape.num_cpus,
            "num_gpus": shape.num_gpus,
            "accelerator_type": shape.accelerator_type,
            "max_restarts": 0,
            "max_task_retries": 0,
        }

    def start(self, worker: str) -> None:
        """Ask the cluster for a worker; news of it comes when it has loaded its model."""
        settings = replace(self._settings, worker=worker)
        if self._spares:
            actor = self._spares.pop()
            call = actor.take_on.remote(settings)
        else:
            name = f"{self._settings.job.name} {self._settings.run[:8]} worker {worker}"
            actor = self._actor.options(**self._options, name=name).remote(settings)
            call = actor.load.remote()
        now = self._clock()
        self._members[worker] = _Member(actor, asked_at=now, call=call, called_at=now)

    def give(self, worker: str, lease: Lease) -> None:
        """Give a lease to a worker; it begins with it at its next call."""
        member = self._members.get(worker)
        if member is not None and member.gone is None:
            member.queue.append(lease)
            self._call(member)

    def cancel(self, worker: str, attempt: str) -> None:
        """Let a worker drop a lease, at its next call."""
        member = self._members.get(worker)
        if member is None:
            return
        kept = [lease for lease in member.queue if lease.attempt != attempt]
        if len(kept) == len(member.queue):
            member.cancelled.append(attempt)
        member.queue = kept

    def stop(self, worker: str) -> None:
        """End a worker at once, or keep it as a spare."""
        member = self._members.get(worker)
        if self._spares is not None and member is not None and member.is_spare:
            self._spares.append(member.actor)
            del self._members[worker]
        else:
            self._kill(worker)

    def _kill(self, worker: str) -> None:
        member = self._members.pop(worker, None)
        if member is not None:
            end_actor(member.actor)

    def stop_all(self) -> None:
        """End all workers at once."""
        for worker in list(self._members):
            self.stop(worker)

    def states(self) -> dict[str, int]:
        """How many workers are starting, ready and draining."""
        counts = {"starting": 0, "ready": 0, "draining": 0}
        for member in self._members.values():
            if member.gone is not None:
                continue
            state = "ready" if member.loaded is not None else "starting"
            counts["draining" if member.draining else state] += 1
        return counts

    @property
    def oldest_start_s(self) -> float:
        """For how long the cluster has owed a worker; 0 when there are some, or none is asked."""
        if not self._members or any(m.loaded is not None for m in self._members.values()):
            return 0.0
        return self._clock() - min(member.asked_at for member in self._members.values())

    def wait(self, timeout_s: float) -> Iterator[News]:
        """News of workers; waits so long for the first.

        Workers on nodes that the cluster is about to take away are told to give back what they
        have. Raises StorageError and OutputError of a worker: they concern the run, not the worker.
        """
        self._notice_draining()
        calls = {m.call: name for name, m in self._members.items() if m.call is not None}
        if not calls:
            time.sleep(timeout_s)
            return
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
        if ready and len(calls) > 1:
            ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for ref in ready:
            member = self._members.get(calls[ref])
            if member is None or member.call != ref:
                continue  # it was ended for the news before
            news = self._collect(calls[ref], ref)
            if news is not None:
                yield news
        yield from self._stuck()

    def finish(self, timeout_s: float) -> Iterator[WorkerReported]:
        """Let all workers publish what is complete and journal the rest, for so long at most, and
        end them."""
        deadline = self._clock() + timeout_s
        members = {
            name: m for name, m in self._members.items() if m.loaded is not None and m.gone is None
        }
        calls = {m.call: name for name, m in members.items() if m.call is not None}
        # One after the other in each actor: the call in flight, then the last one.
        calls |= {m.actor.finish.remote(timeout_s / 2): name for name, m in members.items()}
        while calls and self._clock() < deadline:
            ready, _ = ray.wait(list(calls), timeout=max(0.0, deadline - self._clock()))
            for ref in ready:
                worker = calls.pop(ref)
                try:
                    report = ray.get(ref)
                except RayError:
                    continue  # what it had not made safe is generated again
                yield WorkerReported(worker, report)
        self.stop_all()

    def _call(self, member: _Member) -> None:
        """Let the worker work, unless it does already or has nothing to do."""
        if member.call is not None or member.loaded is None:
            return
        now = self._clock()
        if member.idle_since is not None:
            member.starved_s += now - member.idle_since
            member.idle_since = None
        leases, member.queue = tuple(member.queue), []
        cancelled, member.cancelled = tuple(member.cancelled), []
        member.call = member.actor.work.remote(leases, cancelled, WORK_S, member.draining)
        member.called_at = now

    def _collect(self, worker: str, ref: Any) -> News | None:
        member = self._members[worker]
        member.call = None
        if member.gone is not None:
            return self._looked(worker, member.gone, ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            return self._broken(worker, error)
        except RayError as error:
            return self._lost(worker, error)
        if isinstance(result, Loaded):
            member.loaded = result
            member.idle_since = self._clock()
            self._called_back(member)
            return WorkerLoaded(worker, result, self._clock() - member.asked_at)
        assert isinstance(result, WorkReport)
        member.draining = member.draining or result.draining
        if result.idle:
            member.idle_since = self._clock()
            self._called_back(member)
        else:
            self._call(member)
        starved, member.starved_s = member.starved_s, 0.0
        return WorkerReported(worker, result, starved)

    def _called_back(self, member: _Member) -> None:
        if member.queue:
            self._call(member)

    def _broken(self, worker: str, error: RayTaskError) -> WorkerGone | None:
        """A call raised: what is wrong with the run is raised, the rest ends the worker."""
        cause = error.cause
        if isinstance(cause, StorageError | OutputError):
            raise cause
        loading = self._members[worker].loaded is None
        own = cause if isinstance(cause, BatchrunError) else None
        message = own.message if own is not None else f"{type(cause).__name__}: {cause}"
        kind = LossCause.LOAD if loading else LossCause.CRASH
        return self._give_up(WorkerGone(worker, kind, message, node_lived=True, error=own))

    def _lost(self, worker: str, error: RayError) -> WorkerGone | None:
        """The actor died, or cannot be reached, which is the same."""
        member = self._members[worker]
        text = " ".join(str(error).split())[:300]
        lived = not member.draining and self._node_lives(member, text)
        loading = member.loaded is None
        kind = LossCause.NODE if not lived else LossCause.LOAD if loading else LossCause.CRASH
        message = f"the worker's process died: {_exit_detail(str(error))}"
        return self._give_up(WorkerGone(worker, kind, message, node_lived=lived))

    def _give_up(self, gone: WorkerGone) -> WorkerGone | None:
        """A worker is not to be used any more: the news of it, or None while somebody looks at its
        machine what they are. A worker that hangs lives until then."""
        member = self._members[gone.worker]
        if gone.cause is not LossCause.HANG:
            end_actor(member.actor)
        if member.loaded is None or not gone.node_lived:
            del self._members[gone.worker]
            return gone
        node = NodeAffinitySchedulingStrategy(member.loaded.node_id, soft=False)
        member.gone = gone
        member.queue = []
        member.call = self._look.options(scheduling_strategy=node).remote(
            member.loaded.remains, with_stacks=gone.cause is LossCause.HANG
        )
        member.called_at = self._clock()
        return None

    def _looked(self, worker: str, gone: WorkerGone, ref: Any) -> WorkerGone:
        """Somebody has looked at what a worker left, or has found its machine gone too."""
        try:
            remains: Remains = ray.get(ref)
        except RayError:
            # What is not known for sure is blamed on nobody: the machine may be gone as well.
            lived = gone.node_lived and self._node_lives(self._members[worker], "")
            cause = gone.cause if lived else LossCause.NODE
            gone = replace(gone, cause=cause, node_lived=lived)
        else:
            gone = replace(gone, in_flight=remains.in_flight, stacks=remains.stacks)
        self._kill(worker)
        return gone

    def _stuck(self) -> Iterator[WorkerGone]:
        """Workers whose engine made no step for too long; loading is exempt."""
        now = self._clock()
        for worker, member in list(self._members.items()):
            if member.call is None or member.loaded is None:
                continue
            if self._members.get(worker) is not member:
                continue  # it was ended for the news before
            if member.gone is not None:
                if now - member.called_at > _LOOK_S:
                    ray.cancel(member.call, force=True)
                    self._kill(worker)
                    yield member.gone
            elif now - member.called_at > self._patience_s(member) + WORK_S:
                message = f"no engine step for {self._hang_timeout_s:g} s"
                gone = self._give_up(WorkerGone(worker, LossCause.HANG, message, node_lived=True))
                if gone is not None:
                    yield gone

    def _patience_s(self, member: _Member) -> float:
        """How long a call may last: one that saves everything before the end is no hang."""
        limit = self._hang_timeout_s
        return max(limit, DRAIN_S) if member.draining else limit

    def _notice_draining(self) -> None:
        """Ask the cluster now and then which nodes it is about to take away."""
        now = self._clock()
        if now - self._asked_draining_at < _ASK_DRAINING_EVERY_S:
            return
        self._asked_draining_at = now
        nodes = draining_nodes()
        for member in self._members.values():
            if member.loaded is None or member.draining or member.gone is not None:
                continue
            if member.loaded.node_id in nodes:
                member.draining = True
                self._call(member)  # an idle one says so, too

    def _node_lives(self, member: _Member, text: str) -> bool:
        """Whether the worker's machine outlived it, as far as Ray knows by now."""
        if member.loaded is None:
            return "node" not in text.lower() or "died" not in text.lower()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        return any(n["NodeID"] == member.loaded.node_id and n["Alive"] for n in nodes)
