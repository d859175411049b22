"""The product with int8 matrices on a GPU, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from batchrun.model.ops.int8_kernels import int8_linear
from batchrun.model.quantize import dequantize

generator = torch.Generator().manual_seed(0)
worst = 0.0
for tokens, rows, size in ((1, 65, 130), (3, 64, 128), (17, 70, 77), (130, 5, 40)):
    integers = torch.randint(-127, 128, (rows, size), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, generator=generator) + 0.5
    x = torch.randn(tokens, size, generator=generator)
    wide = torch.full((tokens, rows + 3), 7.0)  # the outputs of rows that are not quantised
    int8_linear(x, integers, scale, wide[:, :rows])
    assert (wide[:, rows:] == 7).all()
    expected = x @ dequantize(integers, scale).t()
    worst = max(worst, ((wide[:, :rows] - expected).abs().max() / expected.abs().mean()).item())
print(worst)
"""


def test_the_kernel_is_the_plain_product() -> None:
    """For sizes that are multiples of nothing, writing nowhere else."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4
