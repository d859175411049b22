"""How memory is divided: what is promised fits, and what cannot fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchrun.engine.memory import BLOCK_SIZE, MemoryRequest, plan_memory
from batchrun.errors import CheckpointError
from batchrun.model.config import ModelConfig

NANO = ModelConfig(
    vocab_size=131072, hidden_size=4480,
    layer_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    intermediate_size=15680, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
    mamba_num_heads=128, mamba_head_dim=80, ssm_state_size=128, num_groups=8,
    max_position_embeddings=131072,
)  # fmt: skip
GIB = 2**30
A10 = MemoryRequest(
    memory_bytes=21 * GIB,
    weight_bytes=17_776_454_656,
    dtype_bytes=2,
    state_dtype_bytes=4,
    num_forced=8,
    max_batch_tokens=2048,
    most_sequences=256,
)


def test_the_large_model_takes_what_is_known_of_it() -> None:
    """143.5 MB of state a sequence and 16 KiB a token: the figures of the 9B model."""
    plan = plan_memory(NANO, A10)
    assert plan.slot_bytes == 27 * (3 * 12288 * 2 + 128 * 80 * 128 * 4)
    assert plan.block_bytes == BLOCK_SIZE * 16384


@pytest.mark.parametrize("gib", [19, 20, 24, 80])
@pytest.mark.parametrize("max_sequences", [None, 1, 8, 1000])
def test_the_parts_fit_and_one_full_sequence_finds_its_blocks(
    gib: int, max_sequences: int | None
) -> None:
    """The table adds up to at most the memory; a sequence of max_model_len can be admitted."""
    request = replace(A10, memory_bytes=gib * GIB, max_sequences=max_sequences)
    plan = plan_memory(NANO, request)
    assert sum(size for _, size in plan.table) <= request.memory_bytes
    assert plan.num_blocks - 1 >= plan.blocks_per_sequence
    assert plan.blocks_per_sequence * BLOCK_SIZE >= plan.max_model_len + 8
    assert plan.num_slots == plan.max_sequences + 1
    assert plan.max_sequences <= (max_sequences or 256)


@pytest.mark.parametrize("gib", [19, 20, 24, 80])
@pytest.mark.parametrize("max_sequences", [None, 1, 8, 40])
def test_snapshots_are_in_the_plan(gib: int, max_sequences: int | None) -> None:
    """The table still fits with them; they cost no length and at most every sixteenth sequence,
    and where there are so many there is a snapshot."""
    request = replace(A10, memory_bytes=gib * GIB, max_sequences=max_sequences, max_model_len=4096)
    plain, plan = plan_memory(NANO, request), plan_memory(NANO, replace(request, most_snapshots=8))
    assert sum(size for _, size in plan.table) <= request.memory_bytes
    assert plan.num_slots == plan.max_sequences + 1 + plan.num_snapshots
    assert plan.num_blocks - 1 - plan.num_snapshot_blocks >= plan.blocks_per_sequence
    assert plan.num_snapshot_blocks * BLOCK_SIZE == plan.num_snapshots * 2048
    share = plain.max_sequences // 16
    assert min(1, share) <= plan.num_snapshots <= min(8, max(1, share))
    assert plan.max_model_len == plain.max_model_len
    assert plain.max_sequences - plan.max_sequences <= share


def test_where_memory_is_scarce_there_are_no_snapshots() -> None:
    """A sequence as long as it can be needs all there is."""
    request = replace(A10, memory_bytes=int(18.5 * GIB), most_snapshots=8)
    assert plan_memory(NANO, request) == plan_memory(NANO, replace(request, most_snapshots=0))


def test_the_length_is_the_checkpoints_as_far_as_one_sequence_fits() -> None:
    """Reduced only when nobody asked for it; asked for, it is refused with what would fit."""
    small = replace(A10, memory_bytes=int(18.5 * GIB))
    plan = plan_memory(NANO, small)
    assert 1000 < plan.max_model_len < NANO.max_position_embeddings
    assert plan_memory(NANO, replace(A10, memory_bytes=80 * GIB)).max_model_len == 131072
    fits = replace(small, max_model_len=plan.max_model_len)
    assert plan_memory(NANO, fits).max_model_len == plan.max_model_len
    with pytest.raises(CheckpointError, match=f"may have {plan.max_model_len} tokens"):
        plan_memory(NANO, replace(small, max_model_len=131072))


def test_a_model_larger_than_memory_is_refused() -> None:
    """With the numbers."""
    with pytest.raises(CheckpointError, match="does not fit: its weights take 16,953 MiB"):
        plan_memory(NANO, replace(A10, memory_bytes=16 * GIB))


def test_models_of_one_kind_of_layer() -> None:
    """Without attention no blocks are needed and any length fits; without Mamba-2 no state."""
    request = replace(A10, weight_bytes=GIB, max_model_len=10**7)
    mamba = plan_memory(replace(NANO, layer_pattern="M-M-"), request)
    assert (mamba.max_model_len, mamba.blocks_per_sequence, mamba.num_blocks) == (10**7, 0, 1)
    attention = plan_memory(replace(NANO, layer_pattern="*-*-"), replace(A10, weight_bytes=GIB))
    assert attention.slot_bytes == 0
    assert attention.max_sequences == 256
