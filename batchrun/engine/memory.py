"""How many sequences and tokens fit into a worker's memory. Pure arithmetic from the sizes."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.errors import CheckpointError
from batchrun.model.config import ModelConfig

BLOCK_SIZE = 32
"""Tokens in a block of keys and values."""
_USUAL_TOKENS = 2048
"""How long a sequence is taken to be where the number of slots is left to us: more of them would
find no blocks, fewer would leave memory unused. Snapshots are given room for as much each."""
_SEQUENCES_PER_SNAPSHOT = 16
"""A snapshot takes the place of a sequence, and most jobs have one beginning for all rows."""


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What the memory is divided by.

    ``memory_bytes`` is for everything: weights, activations, state. ``num_forced`` tokens a
    sequence may be added beyond its length. ``max_model_len`` None asks for the checkpoint's, as
    far as one sequence fits; ``max_sequences`` None for what fits, up to ``most_sequences``.
    ``most_snapshots`` of shared prompt beginnings are kept at most, one for every 16
    sequences but at least one, and fewer where they would cost length or more than one in 16 of
    the sequences.
    """

    memory_bytes: int
    weight_bytes: int
    dtype_bytes: int
    state_dtype_bytes: int
    num_forced: int
    max_batch_tokens: int
    max_model_len: int | None = None
    max_sequences: int | None = None
    most_sequences: int = 64
    most_snapshots: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The division. ``num_slots`` and ``num_blocks`` include the scratch ones and, as the last of
    them, those of the snapshots; the ``*_bytes`` add up to what will be used."""

    max_model_len: int
    max_sequences: int
    num_slots: int
    num_blocks: int
    blocks_per_sequence: int
    num_snapshots: int
    num_snapshot_blocks: int
    weight_bytes: int
    activation_bytes: int
    slot_bytes: int
    block_bytes: int

    @property
    def table(self) -> tuple[tuple[str, int], ...]:
        """What takes how many bytes."""
        return (
            ("weights", self.weight_bytes),
            ("activations", self.activation_bytes),
            ("SSM and conv state", self.num_slots * self.slot_bytes),
            ("attention keys and values", self.num_blocks * self.block_bytes),
        )


def plan_memory(config: ModelConfig, request: MemoryRequest) -> MemoryPlan:
    """Divide the memory.

    :raises CheckpointError: the model, or one sequence of the length asked for, does not fit.
    """
    plain = _divide(config, request, 0)
    usual = max(1, plain.max_sequences // _SEQUENCES_PER_SNAPSHOT)
    for num_snapshots in range(min(request.most_snapshots, usual), 0, -1):
        try:
            plan = _divide(config, request, num_snapshots)
        except CheckpointError:
            continue
        lost = plain.max_sequences - plan.max_sequences
        is_cheap = lost <= plain.max_sequences // _SEQUENCES_PER_SNAPSHOT
        if is_cheap and plan.max_model_len == plain.max_model_len:
            return plan
    return plain


def _divide(config: ModelConfig, request: MemoryRequest, num_snapshots: int) -> MemoryPlan:
    slot_bytes = (
        config.conv_state_elements * request.dtype_bytes
        + config.ssm_state_elements * request.state_dtype_bytes
    )
    block_bytes = config.kv_elements_per_token * request.dtype_bytes * BLOCK_SIZE
    # Logits of one sequence, sorted and summed up: as good as a part of its state.
    logit_bytes = config.vocab_size * 24
    sequence_bytes = slot_bytes + logit_bytes
    pass_bytes = request.max_batch_tokens * _token_bytes(config)
    kept_tokens = min(_USUAL_TOKENS, request.max_model_len or config.max_position_embeddings)
    snapshot_blocks = num_snapshots * _blocks(kept_tokens, 0) if block_bytes else 0
    # One scratch slot and one scratch block beside the sequences'.
    left = request.memory_bytes - request.weight_bytes - pass_bytes - slot_bytes - block_bytes
    left -= num_snapshots * slot_bytes + snapshot_blocks * block_bytes
    if left < sequence_bytes + block_bytes:
        needed = pass_bytes + slot_bytes + sequence_bytes + 2 * block_bytes
        raise CheckpointError(
            f"the model does not fit: its weights take {_mib(request.weight_bytes)}, one pass with "
            f"one sequence {_mib(needed)}, and there are {_mib(request.memory_bytes)} of memory",
            "use a device with more memory, a smaller model, or dtype bfloat16",
        )
    most_blocks = (left - sequence_bytes) // block_bytes if block_bytes else None
    max_model_len = _model_len(config, request, most_blocks)
    per_sequence = _blocks(max_model_len, request.num_forced) if block_bytes else 0
    usual = min(per_sequence, _blocks(_USUAL_TOKENS, request.num_forced)) * block_bytes
    wanted = request.max_sequences or max(
        1, min(request.most_sequences, left // (sequence_bytes + usual))
    )
    # However many are wanted, one sequence of full length must find its blocks.
    fitting = (left - per_sequence * block_bytes) // sequence_bytes
    max_sequences = max(1, min(wanted, fitting))
    num_blocks = max_sequences * per_sequence
    if block_bytes:
        num_blocks = min(num_blocks, (left - max_sequences * sequence_bytes) // block_bytes)
    return MemoryPlan(
        max_model_len=max_model_len,
        max_sequences=max_sequences,
        num_slots=max_sequences + 1 + num_snapshots,
        num_blocks=num_blocks + 1 + snapshot_blocks,
        blocks_per_sequence=per_sequence,
        num_snapshots=num_snapshots,
        num_snapshot_blocks=snapshot_blocks,
        weight_bytes=request.weight_bytes,
        activation_bytes=pass_bytes + max_sequences * logit_bytes,
        slot_bytes=slot_bytes,
        block_bytes=block_bytes,
    )


def _model_len(config: ModelConfig, request: MemoryRequest, most_blocks: int | None) -> int:
    """The longest sequence: as asked for, else the checkpoint's as far as memory holds one."""
    wanted = request.max_model_len or config.max_position_embeddings
    if most_blocks is None or _blocks(wanted, request.num_forced) <= most_blocks:
        return wanted
    holds = most_blocks * BLOCK_SIZE - request.num_forced
    if request.max_model_len is not None or holds < 1:
        raise CheckpointError(
            f"max_model_len {wanted} is beyond what memory holds: one sequence may have "
            f"{max(0, holds)} tokens",
            f"set max_model_len to at most {max(1, holds)}, or use a device with more memory",
        )
    return holds


def _token_bytes(config: ModelConfig) -> int:
    """A generous estimate of what a token takes at the peak of a forward pass.

    The widest layer's input projection and two more values of its width, in float32.
    """
    widest = max(
        config.mamba_proj_size + 2 * config.mamba_inner_size if config.num_mamba_layers else 0,
        2 * config.intermediate_size,
        3 * config.num_attention_heads * config.head_dim,
    )
    return 4 * (widest + 4 * config.hidden_size)


def _blocks(max_model_len: int, num_forced: int) -> int:
    return -(-(max_model_len + num_forced) // BLOCK_SIZE)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
