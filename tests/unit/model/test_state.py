"""The pools have the shapes and the size that the config says."""

from __future__ import annotations

import torch

from batchrun.model.state import State
from tests.unit.model.models import SMALL


def test_size_is_what_the_config_says() -> None:
    """Bytes of the pools = slots and blocks times the numbers that one of them holds."""
    state = State.allocate(SMALL, 5, 9, 4, torch.bfloat16, torch.float32, "cpu")
    expected = 5 * (SMALL.conv_state_elements * 2 + SMALL.ssm_state_elements * 4)
    expected += 9 * 4 * SMALL.kv_elements_per_token * 2
    assert state.size_bytes == expected
    assert (state.num_slots, state.num_blocks, state.block_size) == (5, 9, 4)
    assert state.conv.shape == (3, 5, 3, 60 + 2 * 3 * 12)
    assert state.ssm.shape == (3, 5, 6, 10, 12)
    assert state.keys.shape == state.values.shape == (2, 9, 4, 2, 16)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
