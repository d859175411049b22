"""What a cluster has, and what one worker takes of it. Pure; knows nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.errors import ClusterError

# Ray's label and the card's own name differ for one card: AWS g5 nodes say A10G, others A10.
_SAME_CARD = {"A10": "A10G", "A10G": "A10"}


@dataclass(frozen=True, slots=True)
class Node:
    """One node: logical CPUs, GPUs, and Ray's labels of its accelerators."""

    num_cpus: int
    num_gpus: int
    accelerator_types: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerShape:
    """What one worker asks the cluster for, and how many threads its engine may use."""

    num_cpus: int
    num_gpus: int
    accelerator_type: str | None
    num_threads: int

    def __str__(self) -> str:
        kind = f" ({self.accelerator_type})" if self.accelerator_type else ""
        if self.num_gpus:
            return f"{self.num_gpus} GPU{kind} and {self.num_cpus} CPU"
        return f"{self.num_cpus} CPU{kind}"


@dataclass(frozen=True, slots=True)
class Capacity:
    """All nodes of a cluster."""

    nodes: tuple[Node, ...]

    @property
    def num_cpus(self) -> int:
        """Logical CPUs of all nodes."""
        return sum(node.num_cpus for node in self.nodes)

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(node.num_gpus for node in self.nodes)

    @property
    def accelerator_types(self) -> tuple[str, ...]:
        """Every label of an accelerator that a node has, sorted."""
        return tuple(sorted({kind for node in self.nodes for kind in node.accelerator_types}))

    def __str__(self) -> str:
        kinds = ", ".join(self.accelerator_types) or "none"
        nodes = f"{len(self.nodes)} node{'s' if len(self.nodes) != 1 else ''}"
        return f"{nodes}, {self.num_cpus} CPUs, {self.num_gpus} GPUs (accelerator types: {kinds})"

    def num_places(self, shape: WorkerShape) -> int:
        """How many such workers the nodes could hold if they were idle."""
        return sum(
            min(
                node.num_cpus // max(1, shape.num_cpus),
                node.num_gpus // shape.num_gpus if shape.num_gpus else node.num_cpus,
            )
            for node in self.nodes
            if shape.accelerator_type is None or shape.accelerator_type in node.accelerator_types
        )

    def fits(self, shape: WorkerShape, num_workers: int = 1) -> bool:
        """Whether the nodes could hold so many such workers if they were idle."""
        return self.num_places(shape) >= num_workers

    def require(self, shape: WorkerShape, num_workers: int = 1) -> None:
        """Raise :class:`ClusterError` unless :meth:`fits`; the message says what there is."""
        if self.fits(shape, num_workers):
            return
        if self.fits(shape):
            raise ClusterError(
                f"the cluster has room for {self.num_places(shape)} workers, and the job wants "
                f"{num_workers} at least: each needs {shape}; the cluster has {self}",
                hint="lower resources.workers.min, or add nodes",
            )
        raise ClusterError(
            f"no node can hold a worker: each needs {shape}; the cluster has {self}",
            hint="change resources.accelerator_type or resources.gpus_per_worker "
            "(null and auto take what there is), or add such a node",
        )


def plan_shape(
    capacity: Capacity, num_workers: int, gpus_per_worker: int | None, accelerator_type: str | None
) -> WorkerShape:
    """The resources of one worker. ``gpus_per_worker`` None: 1 where there are GPUs, else 0.

    A GPU worker takes one CPU and may use its node's CPUs divided by its GPUs as threads. A CPU
    worker takes its share of the CPUs, and at most a whole node.
    """
    accelerator = accelerator_type
    if accelerator is not None and accelerator not in capacity.accelerator_types:
        twin = _SAME_CARD.get(accelerator)
        accelerator = twin if twin in capacity.accelerator_types else accelerator
    num_gpus = gpus_per_worker
    if num_gpus is None:
        num_gpus = 1 if capacity.num_gpus or accelerator is not None else 0
    if num_gpus:
        shares = [n.num_cpus // n.num_gpus for n in capacity.nodes if n.num_gpus]
        return WorkerShape(1, num_gpus, accelerator, max(1, min(shares, default=1)))
    largest = max((node.num_cpus for node in capacity.nodes), default=1)
    share = max(1, min(capacity.num_cpus // max(1, num_workers), largest))
    return WorkerShape(share, 0, accelerator, share)
