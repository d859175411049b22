"""A run's connection to its cluster: made when it is needed, watched while it lasts."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from batchrun.cluster.capacity import Capacity, WorkerShape, plan_shape
from batchrun.cluster.session import (
    forget_ray,
    head_address,
    head_answers,
    nodes_are_coming,
    ray_lives,
    ray_session,
    read_capacity,
)
from batchrun.cluster.view import View
from batchrun.errors import InterruptedRunError
from batchrun.job import Job

_CHECK_ALIVE_EVERY_S = 1.0
_GIVE_UP_PENDING_AFTER_S = 60.0
_HEAD_SILENT_S = 20.0  # Ray ends this process after 60


class Cluster:
    """The cluster of one run, or of several of one job after each other; connected to when it is
    needed, and until the end of the ``with``."""

    def __init__(
        self, job: Job, address: str | None, view: View, *, keeps_workers: bool = False
    ) -> None:
        """With ``keeps_workers`` the next run gets the workers of the one before, with the model
        that they have loaded; the runs must agree in model, resources and determinism."""
        self.is_local = address is None
        self.is_lost = False
        """Whether its head is dead: whatever is asked of Ray then waits for it."""
        self._head: str | None = None
        self.spares: list[Any] | None = [] if keeps_workers else None
        """Idle workers without a run."""
        self._resources = job.resources
        self._runtime_env = job.ray.runtime_env
        self._address = address
        self._stack = ExitStack()
        self._view = view
        self._shape: WorkerShape | None = None
        self._capacity: Capacity | None = None
        self._check_at = 0.0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_lost:
            self._stack.close()

    @property
    def is_choosy(self) -> bool:
        """Whether the job asks for something that a machine may not have."""
        return self._resources.accelerator_type is not None or self._resources.gpus_per_worker == 1

    def connect(self) -> WorkerShape:
        """The shape of a worker in this cluster; raises ClusterError when it can hold none."""
        if self._shape is None:
            wanted = self._resources
            self._capacity = self._stack.enter_context(
                ray_session(self._address, wanted.most_workers, self._runtime_env)
            )
            self._stack.callback(self._end_spares)
            if not self.is_local:
                self._head = head_address()
            gpus = wanted.gpus_per_worker
            self._shape = plan_shape(
                self._capacity,
                wanted.most_workers,
                None if gpus == "auto" else gpus,
                wanted.accelerator_type,
            )
            if not self._capacity.fits(self._shape, wanted.fewest_workers):
                self._wait_for_nodes(self._capacity, self._shape, wanted.fewest_workers)
        return self._shape

    def check_alive(self, *, at_once: bool = False) -> None:
        """Raise InterruptedRunError when the Ray of this machine, or the head of the cluster, has
        died: workers would be waited for in vain. Looks for a Ray of this machine once a second;
        a head may be silent for a while, as it may be started again."""
        if self._head is not None:
            self._check_head(self._head)
        now = time.monotonic()
        if self.is_local and (at_once or now >= self._check_at):
            self._check_at = now + _CHECK_ALIVE_EVERY_S
            if not ray_lives():
                raise InterruptedRunError(
                    "the Ray that this run started has died",
                    "everything finished so far is kept; submit again to resume. Memory may have "
                    "been short; Ray's own logs are in /tmp/ray",
                )

    def _check_head(self, address: str) -> None:
        """Return when the head answers. Meanwhile nothing is asked of Ray, which would wait for it
        and then end this process without a word for a person."""
        silent_since: float | None = None
        while not head_answers(address):
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                self._view.say(f"the head of the cluster at {address} does not answer")
            elif now - silent_since > _HEAD_SILENT_S:
                self._head = None
                self.is_lost = True
                forget_ray()
                raise InterruptedRunError(
                    f"the head of the cluster at {address} is dead: it has not answered for "
                    f"{_HEAD_SILENT_S:g} s",
                    "everything finished so far is kept; submit again to resume",
                )
            time.sleep(1.0)

    def num_neighbours(self) -> int:
        """How many workers may share one machine."""
        assert self._capacity is not None and self._shape is not None
        most = max((n.num_cpus // self._shape.num_cpus for n in self._capacity.nodes), default=1)
        return max(1, min(self._resources.most_workers, most))

    def _end_spares(self) -> None:
        from batchrun.cluster.fleet import end_actor

        for actor in self.spares or ():
            end_actor(actor)

    def _wait_for_nodes(self, capacity: Capacity, shape: WorkerShape, num_workers: int) -> None:
        """Bear a cluster that cannot hold the workers yet, as long as it is growing."""
        if self.is_local:
            capacity.require(shape, num_workers)
        self._view.say(f"waiting for a node: a worker needs {shape}; the cluster has {capacity}")
        waited_since = time.monotonic()
        while not capacity.fits(shape, num_workers):
            time.sleep(1.0)
            capacity = read_capacity()
            waited = time.monotonic() - waited_since
            if waited > _GIVE_UP_PENDING_AFTER_S and not nodes_are_coming():
                capacity.require(shape, num_workers)
