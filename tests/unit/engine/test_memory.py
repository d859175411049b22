"""How memory is divided: what is promised fits, and what cannot fit is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from batchrun.engine.accelerators import find_accelerator
from batchrun.engine.memory import BLOCK_SIZE, MemoryRequest, plan_accelerator, plan_memory
from batchrun.errors import CheckpointError
from batchrun.model.config import ModelConfig
from batchrun.model.sizes import Precision, Quantization

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
    precision=Precision(),
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
    request = replace(
        A10, memory_bytes=gib * GIB, max_sequences=max_sequences, recorded_sequences=None
    )
    plan = plan_memory(NANO, request)
    assert plan.recorded_logit_bytes == plan.max_sequences * 131072 * 4
    assert sum(row.size_bytes for row in plan.table) == request.memory_bytes
    assert plan.used_bytes <= request.memory_bytes
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
    assert plan.used_bytes <= request.memory_bytes
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
    request = replace(A10, max_model_len=10**7)
    mamba = plan_memory(replace(NANO, layer_pattern="M-M-"), request)
    assert (mamba.max_model_len, mamba.blocks_per_sequence, mamba.num_blocks) == (10**7, 0, 1)
    attention = plan_memory(replace(NANO, layer_pattern="*-*-"), A10)
    assert attention.slot_bytes == 0
    assert attention.max_sequences == 256


INT8 = Quantization.INT8
NONE = Quantization.NONE
LONG = replace(A10, max_model_len=24_576)


@pytest.mark.parametrize(
    ("tokens", "quantization", "state_dtype_bytes", "published"),
    [
        (8192 + 16384, NONE, 4, 8),
        (8192 + 16384, NONE, 2, 9),
        (8192 + 16384, INT8, 4, 23),
        (8192 + 16384, INT8, 2, 26),
        (1024 + 1024, NONE, 4, 25),
        (1024 + 1024, NONE, 2, 42),
        (1024 + 1024, INT8, 4, 72),
        (1024 + 1024, INT8, 2, 120),
    ],
)
def test_what_an_a10_holds(
    tokens: int, quantization: Quantization, state_dtype_bytes: int, published: int
) -> None:
    """The known numbers of sequences, within one; those leave out the slot of padding rows and the
    logits of recorded steps, and have no snapshots."""
    precision = Precision(2, state_dtype_bytes, quantization)
    a10 = find_accelerator("A10")
    lengths = {"max_model_len": tokens, "sequence_tokens": tokens}
    plan = plan_accelerator(NANO, a10, precision, **lengths, most_snapshots=0, recorded_sequences=0)
    assert abs(plan.max_sequences - published) <= 1
    assert plan.num_sequences_of(tokens) == plan.max_sequences
    assert plan.num_sequences_of(8 * tokens) <= plan.max_sequences // 8 + 1
    assert sum(row.size_bytes for row in plan.table) == a10.memory_bytes
    unused = plan.memory_bytes - plan.used_bytes
    assert unused < plan.slot_bytes + plan.blocks_per_sequence * plan.block_bytes


def test_more_sequences_than_fit_leave_room_for_their_tokens() -> None:
    """A huge max_sequences does not become slots whose sequences find no blocks: as many as have
    room for what is expected of them, and a note says so."""
    plan = plan_memory(NANO, replace(LONG, max_sequences=10**6, sequence_tokens=4000))
    assert plan.num_sequences_of(4000) == plan.max_sequences > 10
    assert plan.notes == (
        f"max_sequences 1000000 does not fit: {plan.max_sequences} run at once, "
        "with room for 4,000 tokens each",
    )
    fewer = plan_memory(NANO, replace(LONG, max_sequences=plan.max_sequences, sequence_tokens=4000))
    assert fewer.notes == ()
    assert (fewer.num_slots, fewer.num_blocks) == (plan.num_slots, plan.num_blocks)


def test_slots_and_blocks_are_balanced_for_what_is_expected() -> None:
    """Long rows: fewer slots, so that all of them find blocks; short ones: more."""
    counts = []
    for tokens in (500, 2048, 24_000):
        plan = plan_memory(NANO, replace(LONG, sequence_tokens=tokens))
        assert plan.num_sequences_of(tokens) == plan.max_sequences
        counts.append(plan.max_sequences)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3 * counts[2]


def test_a_length_that_nobody_asked_for_is_paid_for_knowingly() -> None:
    """Blocks for one sequence of the checkpoint's length leave few slots; a note says what a
    smaller length would bring, and that is what it brings."""
    plan = plan_memory(NANO, A10)
    (note,) = plan.notes
    bounded = plan_memory(NANO, replace(A10, max_model_len=2048))
    assert plan.max_sequences < bounded.max_sequences
    assert note.endswith(f"with max_model_len 2,048 it would be {bounded.max_sequences}")
    assert bounded.notes == ()


def test_int8_makes_room() -> None:
    """Nearly three times the sequences on the memory of an A10."""
    plans = [
        plan_memory(NANO, replace(LONG, precision=Precision(quantization=q))) for q in (NONE, INT8)
    ]
    assert plans[1].max_sequences > 2.7 * plans[0].max_sequences
    assert plans[0].weight_bytes - plans[1].weight_bytes == pytest.approx(8.28e9, rel=1e-3)


def test_a_plan_needs_no_torch() -> None:
    """From the config alone, on a machine that has no GPU."""
    code = (
        "import sys, batchrun.engine.memory, batchrun.engine.roofline\n"
        "print('torch' in sys.modules)"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
