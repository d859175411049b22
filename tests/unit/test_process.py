"""What the package asks of torch and OpenMP, which ask only once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_SCRIPT = """
import os, sys
import batchrun
assert "torch" not in sys.modules, "torch has asked before batchrun could answer"
from batchrun import LLM
import torch
states = torch.zeros(16 << 20)
lines = open("/proc/self/smaps_rollup").read().splitlines()
[huge] = [int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")]
print(huge << 10, os.environ["GOMP_SPINCOUNT"])
"""


@pytest.mark.skipif(
    not _HUGE_PAGES.exists() or "[never]" in _HUGE_PAGES.read_text(),
    reason="this kernel has no huge pages to give",
)
def test_large_tensors_lie_in_huge_pages() -> None:
    """States and weights lie in huge pages where the kernel has them; waiting threads give up their
    core, or do what the user has set."""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env=environment | {"GOMP_SPINCOUNT": "77"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    huge, spins = done.stdout.split()
    assert int(huge) >= 32 << 20  # of 64 MiB; the kernel may be short of some
    assert spins == "77"
