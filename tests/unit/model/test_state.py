"""The pools have the shapes and the size that the config says."""

from __future__ import annotations

import pytest
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


def test_a_copy_is_all_of_a_sequences_state_and_nothing_else() -> None:
    """Slot and blocks of the target hold what those of the source do, NaN included; the others
    hold what they held."""
    state = State.allocate(SMALL, 6, 200, 4, torch.float32, torch.float32, "cpu")
    pools = (state.conv, state.ssm, state.keys, state.values)
    for pool in pools:
        pool.normal_()
    state.keys[:, 11, 3] = torch.nan  # the rows of a last block that nobody wrote
    before = [pool.clone() for pool in pools]
    source, target = [11, *range(20, 90)], [3, *range(100, 170)]
    state.copy(5, source, 2, target)
    for pool, old, one, other in (
        (state.conv, before[0], [5], [2]),
        (state.ssm, before[1], [5], [2]),
        (state.keys, before[2], source, target),
        (state.values, before[3], source, target),
    ):
        assert torch.equal(pool[:, other].nan_to_num(7), old[:, one].nan_to_num(7))
        rest = [i for i in range(pool.shape[1]) if i not in other]
        assert torch.equal(pool[:, rest].nan_to_num(7), old[:, rest].nan_to_num(7))
    with pytest.raises(ValueError, match="2 blocks cannot be copied to 1"):
        state.copy(5, [1, 2], 2, [3])
