"""What a worker takes of a cluster."""

from __future__ import annotations

import pytest

from batchrun.cluster.capacity import Capacity, Node, WorkerShape, plan_shape
from batchrun.errors import ClusterError

CPU_NODE = Node(num_cpus=8, num_gpus=0)
GPU_NODE = Node(num_cpus=16, num_gpus=4, accelerator_types=("A10G",))


@pytest.mark.parametrize(
    ("nodes", "num_workers", "gpus", "accelerator", "shape"),
    [
        ((CPU_NODE,), 1, None, None, WorkerShape(8, 0, None, 8)),
        ((CPU_NODE,), 3, None, None, WorkerShape(2, 0, None, 2)),
        ((CPU_NODE,), 20, None, None, WorkerShape(1, 0, None, 1)),
        ((CPU_NODE, CPU_NODE), 1, None, None, WorkerShape(8, 0, None, 8)),
        ((CPU_NODE, GPU_NODE), 2, None, None, WorkerShape(1, 1, None, 4)),
        ((GPU_NODE,), 2, None, "A10G", WorkerShape(1, 1, "A10G", 4)),
        ((GPU_NODE,), 2, None, "A10", WorkerShape(1, 1, "A10G", 4)),
        ((GPU_NODE,), 4, 0, None, WorkerShape(4, 0, None, 4)),
    ],
)
def test_shape_of_a_worker(
    nodes: tuple[Node, ...],
    num_workers: int,
    gpus: int | None,
    accelerator: str | None,
    shape: WorkerShape,
) -> None:
    """A GPU each where there are some, else a share of the CPUs; A10 and A10G are one card."""
    capacity = Capacity(nodes)
    assert plan_shape(capacity, num_workers, gpus, accelerator) == shape
    assert capacity.fits(shape)


def test_what_a_cluster_has_not_is_said() -> None:
    """An accelerator that no node has is an error that names what the cluster has."""
    capacity = Capacity((GPU_NODE, CPU_NODE))
    shape = plan_shape(capacity, 1, None, "A100")
    with pytest.raises(ClusterError, match=r"A100.*2 nodes, 24 CPUs, 4 GPUs .*A10G"):
        capacity.require(shape)


@pytest.mark.parametrize(
    ("nodes", "shape", "places"),
    [
        ((CPU_NODE, CPU_NODE), WorkerShape(3, 0, None, 3), 4),
        ((CPU_NODE, GPU_NODE), WorkerShape(1, 1, None, 4), 4),
        ((CPU_NODE, GPU_NODE, GPU_NODE), WorkerShape(1, 1, "A10G", 4), 8),
        ((GPU_NODE,), WorkerShape(1, 1, "A100", 4), 0),
    ],
)
def test_room_for_the_fewest_workers(
    nodes: tuple[Node, ...], shape: WorkerShape, places: int
) -> None:
    """So many workers fit as the nodes have room for together, and one more is an error that says
    how many do."""
    capacity = Capacity(nodes)
    assert capacity.num_places(shape) == places
    assert capacity.fits(shape, places) and not capacity.fits(shape, places + 1)
    message = rf"room for {places} workers.*wants {places + 1}" if places else "no node can hold"
    with pytest.raises(ClusterError, match=message):
        capacity.require(shape, places + 1)
