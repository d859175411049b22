"""The kernels of this package are compiled for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchrun.model.ops.mamba_kernels import find_obstacle

SHARED_BYTES = 99 << 10
"""Shared memory that a program may use on an A10 (compute capability 8.6)."""

# In a process of its own, because triton is imported there as it is on a GPU.
PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from batchrun.model.ops import attention_kernels, conv_kernels, int8_kernels, scan_kernels

places = dict.fromkeys("slots tables contexts sequences starts first_chunks".split(), "*i64")
wide = dict.fromkeys("parts part_sums added dt_a_sums".split(), "*fp32")
pointers = "q keys values out x weight bias h delta scales".split()
sizes = dict(
    BLOCK_SIZE=32, GROUP=5, GROUP_PADDED=16, HEAD_DIM=128, HEAD_DIM_PADDED=128, SPLITS=4,
    BLOCK_QUERIES=64, BLOCK_KEYS=64, HAS_BIAS=True, HAS_DELTA=True, KERNEL=4, BLOCK_TOKENS=16,
    BLOCK_ROWS=64,
)
types = dict.fromkeys(pointers, "*bf16") | places | wide
types |= {"is_new": "*i1", "scale": "fp32", "eps": "fp32"}
for module in (attention_kernels, conv_kernels, int8_kernels, scan_kernels):
    for name, kernel in vars(module).items():
        if not name.endswith("_kernel"):
            continue
        # States are float32 for the scan, and what the model is for the convolution.
        types["state"] = "*fp32" if module is scan_kernels else "*bf16"
        types["weight"] = "*i8" if module is int8_kernels else "*bf16"
        blocks = {"add_norm_kernel": 8192, "causal_conv_kernel": 128, "int8_linear_kernel": 128}
        block = blocks.get(name, 1024)
        known = sizes | {"BLOCK": block}
        constants = {key: known[key] for key in kernel.arg_names if key in known}
        source = ASTSource(
            fn=kernel,
            signature={
                key: "constexpr" if key in constants else types.get(key, "i32")
                for key in kernel.arg_names
            },
            constexprs={(kernel.arg_names.index(key),): v for key, v in constants.items()},
        )
        done = triton.compile(
            source, target=GPUTarget("cuda", 86, 32), options={"num_warps": 4, "num_stages": 2}
        )
        print(name, done.metadata.shared, len(done.asm["cubin"]))
"""


def test_every_kernel_compiles_for_an_a10(tmp_path: Path) -> None:
    """In bfloat16, for the sizes of the 9B model, within its shared memory."""
    obstacle = find_obstacle()
    if obstacle is not None:
        pytest.skip(f"{obstacle.reason}: {obstacle.hint}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_F32_DEFAULT": "ieee", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_kernels.py"
    script.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 9
    for name, shared, size in rows:
        assert int(shared) <= SHARED_BYTES, name
        assert int(size) > 0
