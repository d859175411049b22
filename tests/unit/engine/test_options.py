"""Engine options: what a person writes, and what it means here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from batchrun.engine.options import EngineOptions
from batchrun.errors import RequestError
from batchrun.model.config import load_config
from tests.unit.engine.support import TINY


def test_auto_is_float32_on_a_cpu() -> None:
    """Weights and state; the state stays float32 beside bfloat16 weights."""
    options = EngineOptions(device="cpu")
    assert options.torch_dtype is options.torch_state_dtype is torch.float32
    half = EngineOptions(device="cpu", dtype="bfloat16")
    assert (half.torch_dtype, half.torch_state_dtype) == (torch.bfloat16, torch.float32)
    assert EngineOptions(device="cuda").torch_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("device", "overlap", "deterministic", "overlaps"),
    [
        ("cuda", None, False, True),
        ("cuda", False, False, False),
        ("cuda", None, True, False),
        ("cpu", None, False, False),
        ("cpu", True, False, True),
        ("cpu", True, True, False),
    ],
)
def test_steps_overlap_on_a_gpu(
    device: str, overlap: bool | None, deterministic: bool, overlaps: bool
) -> None:
    """Unless it is turned off, and never where every token has a step of its own."""
    options = EngineOptions(device=device, overlap=overlap, deterministic=deterministic)
    assert options.overlaps is overlaps


def test_free_memory_is_a_part_of_the_machines() -> None:
    """Something, and less than all."""
    free = EngineOptions(device="cpu").free_memory_bytes()
    assert 2**20 < free < 2**50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float16"),
        ("state_dtype", "int8"),
        ("quantization", "int4"),
        ("quantization", None),
        ("kv_dtype", "int8"),
        ("kv_dtype", "bfloat16"),
        ("max_model_len", 0),
        ("max_sequences", "auto"),
        ("max_sequences", True),
        ("max_batch_tokens", None),
        ("num_threads", 0),
        ("device", "gpu"),
        ("device", "meta"),
        ("device", None),
    ],
)
def test_a_bad_option_is_named(name: str, value: object) -> None:
    """With the value that was given."""
    with pytest.raises(RequestError, match=name):
        EngineOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "stored", "hidden_size", "is_fast", "dtype"),
    [
        ({}, "bfloat16", 8192, True, "bfloat16"),
        ({}, "bfloat16", 8192, False, "auto"),
        ({}, "float32", 8192, True, "auto"),
        ({}, "bfloat16", 64, True, "auto"),
        ({"deterministic": True}, "bfloat16", 8192, True, "auto"),
        ({"dtype": "float32"}, "bfloat16", 8192, True, "float32"),
        ({"kv_dtype": "float32"}, "bfloat16", 8192, True, "auto"),
    ],
)
def test_auto_is_bfloat16_where_that_is_stored_and_fast(
    options: dict[str, Any],
    stored: str,
    hidden_size: int,
    is_fast: bool,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a large model on a CPU with units for it, and never against what was asked for."""
    monkeypatch.setattr("batchrun.engine.options.has_fast_bfloat16", lambda: is_fast)
    config = replace(load_config(TINY), torch_dtype=stored, hidden_size=hidden_size)
    assert EngineOptions(device="cpu", **options).resolved(config).dtype == dtype
