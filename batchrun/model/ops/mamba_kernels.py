"""mamba-ssm's Triton kernels, as far as they are used, and what must be there for them."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAMBA_VERSION = "2.3.2.post1"
"""Functions are called that another release may name or order differently."""
TRITON_VERSIONS = ("3.6.", "3.7.")
"""Those that the kernels were tested with."""
_INSTALL = "run scripts/install_gpu.sh"


@dataclass(frozen=True, slots=True)
class MambaKernels:
    """Functions of mamba-ssm that launch one kernel each."""

    chunk_cumsum: Callable[..., Any]
    chunk_state: Callable[..., Any]
    bmm_chunk: Callable[..., Any]
    chunk_scan: Callable[..., Any]
    state_update: Callable[..., Any]
    gated_norm: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why the kernels cannot be used here, and what mends it."""

    reason: str
    hint: str


def find_obstacle() -> Obstacle | None:
    """What is missing or of another version; None when the kernels can be loaded.

    Looks at metadata only: no library is imported.
    """
    versions = {}
    for name in ("triton", "mamba-ssm", "einops"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return Obstacle(f"{name} is not installed", _INSTALL)
    if versions["mamba-ssm"] != MAMBA_VERSION:
        return Obstacle(
            f"mamba-ssm {versions['mamba-ssm']} is installed and {MAMBA_VERSION} is needed",
            _INSTALL,
        )
    if not versions["triton"].startswith(TRITON_VERSIONS):
        return Obstacle(
            f"triton {versions['triton']} is installed and the kernels are tested with "
            f"{' and '.join(version + 'x' for version in TRITON_VERSIONS)}",
            "install the torch of constraints.txt, which brings its triton",
        )
    return None


def load_kernels(*, deterministic: bool = False) -> MambaKernels:
    """Import the kernels; nothing is compiled yet.

    ``deterministic`` takes one fixed configuration of each kernel instead of the one that is the
    fastest when they are tried; the first call in a process decides.
    """
    # Products of float32 in float32, as everywhere else. It is read when a kernel is compiled, and
    # is part of the name under which the result is kept on disk.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    # The fastest configuration is looked for once a host, not once a process.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    # `import mamba_ssm` fails without its CUDA extension, which the Triton kernels do not need.
    # So they are imported below a bare module of that name, and the package's own code never runs.
    package = sys.modules.get("mamba_ssm")
    if package is None:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("mamba_ssm is not installed as a package")
        bare = types.ModuleType("mamba_ssm")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"] = bare
    try:
        if deterministic:
            settings = importlib.import_module("mamba_ssm.utils.determinism")
            # Its environment variable would mean the configurations that were found earlier.
            os.environ["TRITON_CACHE_AUTOTUNING"] = "0"
            settings.set_deterministic_mode(True)
        ops = {
            name: importlib.import_module(f"mamba_ssm.ops.triton.{name}")
            for name in (
                "ssd_chunk_state",
                "ssd_bmm",
                "ssd_chunk_scan",
                "selective_state_update",
                "layernorm_gated",
            )
        }
    finally:
        if package is None:
            # Whoever imports the real package later finds what is really there.
            del sys.modules["mamba_ssm"]
    return MambaKernels(
        chunk_cumsum=ops["ssd_chunk_state"]._chunk_cumsum_fwd,
        chunk_state=ops["ssd_chunk_state"]._chunk_state_fwd,
        bmm_chunk=ops["ssd_bmm"]._bmm_chunk_fwd,
        chunk_scan=ops["ssd_chunk_scan"]._chunk_scan_fwd,
        state_update=ops["selective_state_update"].selective_state_update,
        gated_norm=ops["layernorm_gated"]._layer_norm_fwd,
    )
