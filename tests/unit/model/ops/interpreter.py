"""The Triton operators on CPU tensors, in a process of their own under Triton's interpreter.

The interpreter must be switched on before triton is imported, and works for a whole process.
Operators are called here and run there; what they change in place is changed here too.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

_PROCESSORS = 64
"""As if the interpreter had so many, so that contexts are cut into pieces."""


class InterpretedOps:
    """An ``Ops`` whose operators run in the other process."""

    rectangles = False

    def __init__(self, process: ProcessPoolExecutor) -> None:
        self._process = process

    def imported_modules(self) -> set[str]:
        """What the other process has imported."""
        return self._process.submit(_modules).result(timeout=120)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            sent = pickle.dumps((name, args, kwargs))
            out, args_after, kwargs_after = pickle.loads(
                self._process.submit(_run, sent).result(timeout=120)
            )
            for mine, changed in [
                *zip(args, args_after, strict=True),
                *((kwargs[key], kwargs_after[key]) for key in kwargs),
            ]:
                if isinstance(mine, Tensor) and not torch.equal(mine, changed):
                    mine.copy_(changed)
            return out  # type: ignore[no-any-return]

        return call


def prepare() -> None:
    """What the other process does first."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # mamba-ssm launches on `torch.cuda.device(...)`, which a torch without CUDA has not.
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]


def _modules() -> set[str]:
    return set(sys.modules)


def _run(sent: bytes) -> bytes:
    from batchrun.model.ops.fast import TritonOps
    from batchrun.model.ops.mamba_kernels import load_kernels

    name, args, kwargs = pickle.loads(sent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without a GPU there is nothing to choose a configuration by, so there must be one only.
        ops = TritonOps(load_kernels(deterministic=True), _PROCESSORS)
        with torch.inference_mode():
            out = getattr(ops, name)(*args, **kwargs)
    return pickle.dumps((out, args, kwargs))
