"""What this device can do at most, measured: how fast it copies and multiplies matrices."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from batchrun.engine.accelerators import Accelerator, find_accelerator
from batchrun.errors import RequestError
from batchrun.model.checkpoint import expected_tensors
from batchrun.model.config import ModelConfig
from batchrun.model.sizes import is_linear

_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Far more than caches hold, on most machines."""
_MATRIX_BYTES = 512 << 20
"""Of weights held for the products: a model's, or a part of each of its shapes."""


_GLANCE_BYTES = 64 << 20
_GLANCE_ROWS, _GLANCE_SIZE = 128, 1024


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """``copy_bandwidth`` in bytes a second, read and written both counted. ``matmul_flops``: tokens
    in a batch -> operations a second in the matrices of the model, two for each weight and token;
    where few tokens share a read of the weights this is a measure of bandwidth too."""

    copy_bandwidth: float
    matmul_flops: dict[int, float]

    def fastest(self, other: DeviceRates) -> DeviceRates:
        """The larger of each rate: whatever else runs on a machine only makes it slower."""
        flops = dict(self.matmul_flops)
        for batch, rate in other.matmul_flops.items():
            flops[batch] = max(rate, flops.get(batch, 0.0))
        return DeviceRates(max(self.copy_bandwidth, other.copy_bandwidth), flops)


def measure_rates(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    batches: Sequence[int],
    *,
    seconds: float = 0.5,
) -> DeviceRates:
    """Measure for ``seconds`` each the copy, and products of each of ``batches`` with all shapes of
    matrices of the model in ``dtype``; of each the fastest time counts."""
    return DeviceRates(
        _copy_bandwidth(device, seconds),
        {batch: _matmul_flops(config, dtype, device, batch, seconds) for batch in batches},
    )


def find_device(device: torch.device, dtype: torch.dtype) -> Accelerator | None:
    """The device as :mod:`~batchrun.engine.accelerators` describes one: a GPU by its name, None for
    one that is not known; a CPU measured, within about a tenth of a second."""
    if device.type == "cuda":
        try:
            return find_accelerator(torch.cuda.get_device_name(device))
        except RequestError:
            return None
    source = torch.ones(_GLANCE_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * _GLANCE_BYTES / _fastest(lambda: target.copy_(source), device, 0.02)
    x = torch.full((_GLANCE_ROWS, _GLANCE_SIZE), 0.01, dtype=dtype)
    weight = torch.full((_GLANCE_SIZE, _GLANCE_SIZE), 0.01, dtype=dtype)
    flops = 2 * _GLANCE_ROWS * _GLANCE_SIZE**2 / _fastest(lambda: x @ weight, device, 0.02)
    return Accelerator("CPU", 0, bandwidth, flops)


def linear_shapes(config: ModelConfig) -> Counter[tuple[int, int]]:
    """The shapes [out, in] of the matrices of a model, logits included, and how many have each."""
    shapes: Counter[tuple[int, int]] = Counter()
    for name, shape in expected_tensors(config).items():
        if is_linear(name):
            shapes[shape[0], shape[1]] += 1
    shapes[config.vocab_size, config.hidden_size] += 1
    return shapes


def _copy_bandwidth(device: torch.device, seconds: float) -> float:
    size = _COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, seconds)


def _matmul_flops(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, batch: int, seconds: float
) -> float:
    """Each shape is multiplied in turn with several matrices, so that none waits in a cache that
    would not hold the model."""
    shapes = linear_shapes(config)
    total = sum(rows * columns * count for (rows, columns), count in shapes.items())
    share = min(1.0, _MATRIX_BYTES / (total * dtype.itemsize))
    needed = 0.0

    def filled(rows: int, columns: int) -> torch.Tensor:
        return torch.full((rows, columns), 0.01, dtype=dtype, device=device)

    for (rows, columns), count in shapes.items():
        held = max(1, int(count * share))
        weights = [filled(rows, columns) for _ in range(held)]
        x = filled(batch, columns)
        out = torch.empty(batch, rows, dtype=dtype, device=device)

        def multiply(
            x: torch.Tensor = x, weights: list[torch.Tensor] = weights, out: torch.Tensor = out
        ) -> None:
            for weight in weights:
                torch.mm(x, weight.t(), out=out)

        needed += _fastest(multiply, device, seconds / len(shapes)) * count / held
    return 2 * batch * total / needed


def _fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time of a call, of as many as fit into ``seconds``, at least three."""
    run()
    fastest = float("inf")
    end = time.perf_counter() + seconds
    count = 0
    while count < 3 or time.perf_counter() < end:
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
        count += 1
    return fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
