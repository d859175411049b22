"""The Ray session of a run: started on this machine, or an existing cluster joined.

A local Ray is kept lean (no dashboard, a small object store, no log forwarding): a run moves
keys and counts through Ray and nothing else, so start-up time is what matters.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from batchrun.cluster.address import find_dashboard, host_and_port
from batchrun.cluster.capacity import Capacity, Node
from batchrun.errors import ClusterError

_OBJECT_STORE_BYTES = 80 * 2**20  # Ray's floor is 75 MiB; results are a few hundred bytes each
_ANSWER_S = 2.0
_LABEL = "accelerator_type:"  # how Ray names an accelerator among a node's resources
_RAY_SETTER = "set_sigterm_handler"  # Ray's function that replaces the handler of SIGTERM


@contextlib.contextmanager
def ray_session(
    address: str | None, num_workers: int, runtime_env: Mapping[str, object]
) -> Iterator[Capacity]:
    """Be connected to Ray inside the ``with``; yields what the cluster has.

    ``address`` None starts a Ray on this machine and stops it at the end; ``auto`` or a URL joins
    an existing cluster. A session that this process already has is used as it is and left open.
    Raises :class:`ClusterError` when no cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # nor a second Ray when the first dies
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a future warning
    import ray

    if ray.is_initialized():
        yield read_capacity()
        return
    with _signals_kept():
        _connect(address, num_workers, runtime_env)
    try:
        yield read_capacity()
    finally:
        with _signals_kept():
            ray.shutdown()


def _connect(address: str | None, num_workers: int, runtime_env: Mapping[str, object]) -> None:
    import ray

    common: dict[str, Any] = {
        "log_to_driver": False,  # Ray prints workers' lines on stdout, which is for data
        "logging_level": logging.ERROR,
        "runtime_env": dict(runtime_env) or None,
    }
    try:
        if address is None:
            ray.init(
                address="local",  # never whatever cluster happens to run here
                include_dashboard=False,
                num_cpus=max(os.cpu_count() or 1, num_workers),
                object_store_memory=_OBJECT_STORE_BYTES,
                **common,
            )
        else:
            if find_dashboard(address) != address:
                raise ConnectionError("a dashboard listens there; the head has a port of its own")
            ray.init(address=address, **common)
    except Exception as error:  # Ray raises bare ones, when it starts too slowly for example
        if address is None:
            raise ClusterError(
                f"Ray could not be started on this machine: {_first_line(error)}",
                hint="`batchrun doctor` checks the machine; Ray's own logs are in /tmp/ray",
            ) from error
        raise ClusterError(
            f"no Ray cluster answers at {address!r}: {_first_line(error)}",
            hint="start one with `ray start --head`, give --address, or use `batchrun submit`, "
            "which starts a Ray of its own on this machine",
        ) from error


def read_capacity() -> Capacity:
    """What the connected cluster has: one :class:`Node` for each node that is alive."""
    import ray

    nodes = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            resources = node["Resources"]
            labels = (name for name in resources if name.startswith(_LABEL))
            nodes.append(
                Node(
                    num_cpus=int(resources.get("CPU", 0)),
                    num_gpus=int(resources.get("GPU", 0)),
                    accelerator_types=tuple(sorted(name[len(_LABEL) :] for name in labels)),
                )
            )
    return Capacity(tuple(nodes))


def ray_lives() -> bool:
    """Whether this process is still connected, to a Ray with a node that is alive."""
    import ray

    try:
        return ray.is_initialized() and bool(read_capacity().nodes)
    except Exception:  # many kinds, after Ray's own time limits
        return False


def head_address() -> str:
    """Where the head of the connected cluster listens, as host:port."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def head_answers(address: str) -> bool:
    """Whether somebody listens there. Asks the network, not Ray, whose calls would wait for a dead
    head until Ray ends this process."""
    place = host_and_port(address)
    assert place is not None
    try:
        socket.create_connection(place, timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True


def forget_ray() -> None:
    """Give up a cluster whose head is dead: its shutdown would wait for it, now and at exit."""
    import ray

    atexit.unregister(ray.shutdown)


def nodes_are_coming() -> bool:
    """Whether the cluster's autoscaler is starting nodes; False when nobody can say."""
    import ray

    try:
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return bool(status.pending_launches or status.pending_nodes)
    except Exception:  # a developer API of Ray: whatever it does, it must not stop a run
        return False


def draining_nodes() -> frozenset[str]:
    """The ids of nodes that the cluster is about to take away, by ``ray drain-node`` or a notice
    of preemption; none when nobody can say."""
    try:
        from ray._private.state import state

        return frozenset(state.get_draining_nodes())
    except Exception:  # not a public API: whatever it does, it must not stop a run
        return frozenset()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep the process's own signal handlers while Ray starts or stops.

    ray.init replaces SIGTERM's in its first lines, by one that exits from wherever it is: a run
    that was told to stop would end without a word, or, where the exit meets a callback, print a
    traceback and go on. So Ray is kept from setting one; where it does all the same, the handlers
    are put back at the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    setter = getattr(utils, _RAY_SETTER, None)
    if setter is not None:
        setattr(utils, _RAY_SETTER, lambda handler: None)
    try:
        yield
    finally:
        if setter is not None:
            setattr(utils, _RAY_SETTER, setter)
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)
