"""How an engine is set up, as a person wrote it, and what that means on this machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from batchrun.engine.accelerators import margin_bytes
from batchrun.engine.memory import (
    CPU_SEQUENCES,
    GPU_SEQUENCES,
    GRAPH_BYTES,
    MAX_BATCH_TOKENS,
    MAX_SNAPSHOTS,
    MemoryRequest,
)
from batchrun.errors import RequestError
from batchrun.model.config import ModelConfig
from batchrun.model.ops.mamba_kernels import find_obstacle
from batchrun.model.packed import has_fast_bfloat16
from batchrun.model.sizes import Precision, Quantization

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MIN_BFLOAT16_BYTES = 64 << 20
"""Below, a model is in the cache of a CPU as it is, and its matrices are no burden."""
_ABSENT = "is not available in this version"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options of :meth:`~batchrun.engine.engine.Engine.load`.

    ``dtype`` auto is bfloat16 on a GPU; on a CPU it is float32, but bfloat16 where the checkpoint's
    weights are that and take 64 MiB or more, the CPU multiplies it faster (AVX512-BF16, AMX), and
    ``deterministic`` is off. ``state_dtype`` auto is float32.
    ``quantization`` int8 makes the matrices 8-bit integers while they are loaded: half the bytes
    of bfloat16. ``kv_dtype`` is that of keys and values: auto or the model's.
    ``max_model_len`` bounds prompt + output; None = the checkpoint's, as far as memory holds one
    sequence. ``max_sequences`` run at once at most; None = as many as are useful and fit.
    ``sequence_tokens`` are expected to be reserved for a sequence, prompt and output; None = 2048.
    ``max_batch_tokens`` go through the model in one step, beyond one for each decoding sequence.
    ``deterministic`` makes the results of a sequence equal to the byte whatever runs beside it, at
    a cost in speed. ``memory_bytes`` bounds what the engine uses; None = what is free, on a CPU
    half of it. ``num_threads`` is torch's while a step runs; None leaves it as it is. A small model
    on a CPU runs on one thread whatever it says. ``prefix_states`` keeps the states of prompt
    beginnings that many prompts share, so that they are computed once; with ``deterministic`` it is
    off, because where a prompt is cut would depend on what else the engine has seen.
    ``overlap`` runs a step while the tokens of the one before are taken in; None = on a GPU. With
    ``deterministic`` it is off, as every token there has a step of its own.
    ``random_weights`` take the place of the checkpoint's, of which only the config is read then:
    for measurements.

    :raises RequestError: a value that is not one of those named.
    """

    dtype: str = "auto"
    state_dtype: str = "auto"
    quantization: str = "none"
    kv_dtype: str = "auto"
    max_model_len: int | None = None
    max_sequences: int | None = None
    sequence_tokens: int | None = None
    max_batch_tokens: int = MAX_BATCH_TOKENS
    deterministic: bool = False
    device: str = "auto"
    memory_bytes: int | None = None
    num_threads: int | None = None
    prefix_states: bool = True
    overlap: bool | None = None
    random_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("dtype", "state_dtype"):
            value = getattr(self, name)
            if value != "auto" and value not in _DTYPES:
                raise RequestError(f"{name} must be auto, bfloat16 or float32, not {value!r}")
        if self.quantization not in list(Quantization):
            raise RequestError(f"quantization {self.quantization!r} {_ABSENT}", "use int8 or none")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device)):
            raise RequestError(f"device must be auto, cpu, cuda or cuda:N, not {self.device!r}")
        if self.kv_dtype not in ("auto", str(self.torch_dtype).removeprefix("torch.")):
            raise RequestError(
                f"kv_dtype {self.kv_dtype!r} beside dtype {self.dtype!r} {_ABSENT}", "use auto"
            )
        counts = ("max_model_len", "max_sequences", "sequence_tokens", "max_batch_tokens")
        for name in (*counts, "num_threads"):
            value = getattr(self, name)
            if value is None and name != "max_batch_tokens":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RequestError(f"{name} must be a positive whole number, not {value!r}")

    @property
    def torch_device(self) -> torch.device:
        """The device: as named, else a GPU where there is one."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32

    @property
    def overlaps(self) -> bool:
        """Whether a step runs while the one before is taken in."""
        wanted = self.torch_device.type == "cuda" if self.overlap is None else self.overlap
        return wanted and not self.deterministic

    def resolved(self, config: ModelConfig) -> EngineOptions:
        """The same, with ``dtype`` auto decided for a checkpoint on this machine."""
        is_cpu = self.torch_device.type == "cpu"
        if self.dtype != "auto" or self.kv_dtype != "auto" or not is_cpu or self.deterministic:
            return self
        if config.torch_dtype != "bfloat16" or not has_fast_bfloat16():
            return self
        if replace(self, dtype="bfloat16").precision.weight_bytes(config) < _MIN_BFLOAT16_BYTES:
            return self
        return replace(self, dtype="bfloat16")

    @property
    def torch_state_dtype(self) -> torch.dtype:
        """The type of the SSM state."""
        return torch.float32 if self.state_dtype == "auto" else _DTYPES[self.state_dtype]

    @property
    def precision(self) -> Precision:
        """The types as sizes."""
        return Precision(
            self.torch_dtype.itemsize,
            self.torch_state_dtype.itemsize,
            Quantization(self.quantization),
        )

    def memory_request(self, num_forced: int) -> MemoryRequest:
        """What the memory of this machine is divided by; ``num_forced`` tokens may be added to a
        sequence beyond its length."""
        is_gpu = self.torch_device.type == "cuda"
        has_kernels = is_gpu and find_obstacle() is None
        recorded = 1 if self.deterministic else None
        return MemoryRequest(
            memory_bytes=self.memory_bytes or self.free_memory_bytes(),
            precision=self.precision,
            num_forced=num_forced,
            max_batch_tokens=self.max_batch_tokens,
            max_model_len=self.max_model_len,
            max_sequences=self.max_sequences,
            sequence_tokens=self.sequence_tokens,
            most_sequences=GPU_SEQUENCES if is_gpu else CPU_SEQUENCES,
            most_snapshots=MAX_SNAPSHOTS if self.prefix_states and not self.deterministic else 0,
            recorded_sequences=recorded if has_kernels else 0,
            graph_bytes=GRAPH_BYTES if is_gpu else 0,
            has_kernels=has_kernels,
        )

    def free_memory_bytes(self) -> int:
        """What the engine may use where nobody said."""
        device = self.torch_device
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return max(0, free - margin_bytes(total))
        return _available_bytes() // 2


def _available_bytes() -> int:
    """Host memory that can be had: what Linux calls available, within the container's limit.

    Elsewhere half of what there is.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
        available = sizes["MemAvailable:"]
    except (OSError, KeyError, ValueError, IndexError):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that were only read are counted as used, but make room at once.
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
    except (OSError, KeyError, ValueError):  # no such file, or "max": no limit
        return available
    return max(0, min(available, limit - used))
