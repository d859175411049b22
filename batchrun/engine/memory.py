"""How many sequences and tokens fit into a worker's memory. Pure arithmetic from the sizes.

The engine allocates what is planned here, and a plan for a machine that is not at hand is made by
the same functions, so that it never promises what the engine cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from batchrun.engine.accelerators import Accelerator
from batchrun.errors import CheckpointError
from batchrun.model.config import ModelConfig
from batchrun.model.sizes import INT8_SCRATCH_BYTES, Precision, Quantization

BLOCK_SIZE = 32
"""Tokens in a block of keys and values."""
USUAL_TOKENS = 2048
"""How long a sequence is taken to be where nobody said: more slots would find no blocks, fewer
would leave memory unused. Snapshots are given room for as much each."""
_USUAL_PROMPT_TOKENS = 1024
MAX_BATCH_TOKENS = 2048
"""Tokens of a step, beyond one for each decoding sequence."""
GPU_SEQUENCES, CPU_SEQUENCES = 256, 64
"""Beyond so many at once a step mostly gets longer."""
MAX_SNAPSHOTS = 8
"""States of shared prompt beginnings."""
GRAPH_BYTES = 200 << 20
"""What captured CUDA graphs take beside the tensors that they share: an estimate."""
_SEQUENCES_PER_SNAPSHOT = 16
"""A snapshot takes the place of a sequence, and most jobs have one beginning for all rows."""


def expected_tokens(max_tokens: int) -> int:
    """``sequence_tokens`` of a job that may generate ``max_tokens`` a row: these are reserved when
    a row is admitted, and its prompt, whose length nobody knows yet."""
    return _USUAL_PROMPT_TOKENS + max_tokens


@dataclass(frozen=True, slots=True)
class MemoryRequest:
    """What the memory is divided by.

    ``memory_bytes`` is for everything: weights, activations, state. ``num_forced`` tokens a
    sequence may be added beyond its length. ``max_model_len`` None asks for the checkpoint's, as
    far as one sequence fits; ``max_sequences`` None for what fits, up to ``most_sequences``.
    ``sequence_tokens`` is how many tokens of prompt and output a sequence is expected to reserve;
    slots and blocks are balanced for that. ``most_snapshots`` of shared prompt beginnings are kept
    at most, one for every 16 sequences but at least one, and fewer where they would cost length or
    more than one in 16 of the sequences. Decode steps of up to ``recorded_sequences`` are recorded
    (None: of all), and their logits have one place beside the ``graph_bytes`` of the recordings.
    ``has_kernels``: activations are those of fused kernels, not of the plain operators.
    ``outside_bytes`` of the device are not the engine's, and stand in the table alone.
    """

    memory_bytes: int
    precision: Precision
    num_forced: int
    max_batch_tokens: int = MAX_BATCH_TOKENS
    max_model_len: int | None = None
    max_sequences: int | None = None
    sequence_tokens: int | None = None
    most_sequences: int = CPU_SEQUENCES
    most_snapshots: int = 0
    recorded_sequences: int | None = 0
    graph_bytes: int = 0
    has_kernels: bool = False
    outside_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """A line of the table: what takes how many bytes, and how that comes about."""

    name: str
    size_bytes: int
    detail: str


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The division. ``num_slots`` and ``num_blocks`` include the scratch ones and, as the last of
    them, those of the snapshots; the rows of ``table`` add up to the memory asked for and what is
    outside. ``notes`` say what was wished for and does not fit."""

    max_model_len: int
    max_sequences: int
    num_slots: int
    num_blocks: int
    blocks_per_sequence: int
    num_snapshots: int
    num_snapshot_blocks: int
    weight_bytes: int
    activation_bytes: int
    recorded_logit_bytes: int
    graph_bytes: int
    slot_bytes: int
    block_bytes: int
    memory_bytes: int
    outside_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Slots of conv and SSM state: the sequences', the snapshots' and the scratch one."""
        return self.num_slots * self.slot_bytes

    @property
    def kv_bytes(self) -> int:
        """Blocks of keys and values: the sequences', the snapshots' and the scratch one."""
        return self.num_blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        """What the engine will use of ``memory_bytes``."""
        parts = (self.weight_bytes, self.state_bytes, self.kv_bytes)
        return sum(parts) + self.activation_bytes + self.recorded_logit_bytes + self.graph_bytes

    @property
    def table(self) -> tuple[MemoryRow, ...]:
        """What takes how many bytes, the largest parts first as they are allocated."""
        tokens = (self.num_blocks - 1 - self.num_snapshot_blocks) * BLOCK_SIZE
        snapshots = f" + {self.num_snapshots} of snapshots" if self.num_snapshots else ""
        rows = [
            MemoryRow("weights", self.weight_bytes, ""),
            MemoryRow(
                "SSM and conv state",
                self.state_bytes,
                f"{self.max_sequences} sequences{snapshots} + 1 of padding, "
                f"{self.slot_bytes / 1e6:,.1f} MB each",
            ),
            MemoryRow(
                "keys and values",
                self.kv_bytes,
                f"{tokens:,} tokens, {self.block_bytes // BLOCK_SIZE:,} bytes each",
            ),
            MemoryRow("activations", self.activation_bytes, "at the peak of a step"),
            MemoryRow("logits of recorded steps", self.recorded_logit_bytes, "float32"),
            MemoryRow("CUDA graphs", self.graph_bytes, ""),
            MemoryRow("not the engine's", self.outside_bytes, "CUDA itself, and a margin"),
            MemoryRow("unused", self.memory_bytes - self.used_bytes, ""),
        ]
        return tuple(row for row in rows if row.size_bytes)

    def num_sequences_of(self, num_tokens: int) -> int:
        """How many sequences that reserve ``num_tokens`` each run at once."""
        if not self.blocks_per_sequence:
            return self.max_sequences
        own = self.num_blocks - 1 - self.num_snapshot_blocks
        return min(self.max_sequences, own // _blocks(max(1, num_tokens), 0))


def plan_accelerator(
    config: ModelConfig, accelerator: Accelerator, precision: Precision, **wishes: int | None
) -> MemoryPlan:
    """The division of a device that an engine has to itself, as :func:`plan_memory` makes it.

    ``wishes`` are fields of :class:`MemoryRequest`: lengths, sequences, tokens.

    :raises CheckpointError: the model, or one sequence of the length asked for, does not fit.
    """
    request = MemoryRequest(
        memory_bytes=accelerator.usable_bytes,
        precision=precision,
        num_forced=0,
        most_sequences=GPU_SEQUENCES,
        most_snapshots=MAX_SNAPSHOTS,
        recorded_sequences=None,
        graph_bytes=GRAPH_BYTES,
        has_kernels=True,
        outside_bytes=accelerator.memory_bytes - accelerator.usable_bytes,
    )
    return plan_memory(config, replace(request, **wishes))  # type: ignore[arg-type]


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
    precision = request.precision
    weight_bytes = precision.weight_bytes(config)
    slot_bytes = precision.slot_bytes(config)
    block_bytes = precision.token_bytes(config) * BLOCK_SIZE
    # Sampling comes after the pass, and takes the memory that it left.
    logit_bytes = config.vocab_size * 24  # logits of a sequence, sorted and summed up
    pass_bytes = _pass_bytes(config, request)
    spare_logits = pass_bytes // logit_bytes

    def sampling_bytes(count: int) -> int:
        return max(0, count - spare_logits) * logit_bytes

    def recorded_bytes(count: int) -> int:
        most = request.recorded_sequences
        return (count if most is None else min(count, most)) * config.vocab_size * 4

    kept_tokens = min(USUAL_TOKENS, request.max_model_len or config.max_position_embeddings)
    snapshot_blocks = num_snapshots * _blocks(kept_tokens, 0) if block_bytes else 0
    # One scratch slot and one scratch block beside the sequences'.
    fixed_bytes = weight_bytes + pass_bytes + request.graph_bytes + slot_bytes + block_bytes
    left = request.memory_bytes - fixed_bytes
    left -= num_snapshots * slot_bytes + snapshot_blocks * block_bytes
    one_bytes = slot_bytes + sampling_bytes(1) + recorded_bytes(1)
    if left < one_bytes + block_bytes:
        needed = fixed_bytes - weight_bytes + one_bytes + block_bytes
        raise CheckpointError(
            f"the model does not fit: its weights take {_mib(weight_bytes)}, one pass with "
            f"one sequence {_mib(needed)}, and there are {_mib(request.memory_bytes)} of memory",
            "use a device with more memory, a smaller model, dtype bfloat16, or quantization int8",
        )
    most_blocks = (left - one_bytes) // block_bytes if block_bytes else None
    max_model_len = _model_len(config, request, most_blocks)
    per_sequence = _blocks(max_model_len, request.num_forced) if block_bytes else 0
    usual_tokens = min(max_model_len, request.sequence_tokens or USUAL_TOKENS)
    usual = _blocks(usual_tokens, request.num_forced) * block_bytes if block_bytes else 0

    def fits(count: int, reserved_bytes: int) -> bool:
        logits = sampling_bytes(count) + recorded_bytes(count)
        return count * slot_bytes + reserved_bytes + logits <= left

    # One sequence of full length must find its blocks, and all of them those of a usual one.
    wanted = request.max_sequences or request.most_sequences
    longest = per_sequence * block_bytes
    max_sequences = _most(wanted, lambda count: fits(count, max(longest, count * usual)))
    notes = []
    if request.max_sequences is not None and max_sequences < wanted:
        notes.append(
            f"max_sequences {wanted} does not fit: {max_sequences} run at once, "
            f"with room for {usual_tokens:,} tokens each"
        )
    if request.max_model_len is None:
        bounded = _most(wanted, lambda count: fits(count, count * usual))
        if bounded > max_sequences:
            notes.append(
                f"one sequence of {max_model_len:,} tokens must fit, so {max_sequences} run at "
                f"once; with max_model_len {usual_tokens:,} it would be {bounded}"
            )
    more_logits = sampling_bytes(max_sequences)
    num_blocks = max_sequences * per_sequence
    if block_bytes:
        logits = more_logits + recorded_bytes(max_sequences)
        for_blocks = left - max_sequences * slot_bytes - logits
        num_blocks = min(num_blocks, for_blocks // block_bytes)
    return MemoryPlan(
        max_model_len=max_model_len,
        max_sequences=max_sequences,
        num_slots=max_sequences + 1 + num_snapshots,
        num_blocks=num_blocks + 1 + snapshot_blocks,
        blocks_per_sequence=per_sequence,
        num_snapshots=num_snapshots,
        num_snapshot_blocks=snapshot_blocks,
        weight_bytes=weight_bytes,
        activation_bytes=pass_bytes + more_logits,
        recorded_logit_bytes=recorded_bytes(max_sequences),
        graph_bytes=request.graph_bytes,
        slot_bytes=slot_bytes,
        block_bytes=block_bytes,
        memory_bytes=request.memory_bytes,
        outside_bytes=request.outside_bytes,
        notes=tuple(notes),
    )


def _most(wanted: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``wanted`` that fits, or 1: found by halving, as what fits with more
    fits with fewer."""
    low, high = 1, wanted
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


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


def _pass_bytes(config: ModelConfig, request: MemoryRequest) -> int:
    """An estimate of what a forward pass takes at its peak: of one layer, the one that needs most.

    A Mamba-2 layer holds its projection, the mixed channels and, for each chunk, states in float32
    before and after it; the plain operators beside that the products of the scan in float32.
    """
    size, hidden, inner = request.precision.dtype_bytes, config.hidden_size, config.mamba_inner_size
    states = 2 * inner * config.ssm_state_size // config.chunk_size
    mamba = (config.mamba_proj_size + 2 * config.conv_dim + 2 * inner) * size + 4 * states
    if request.has_kernels:
        mamba += 4 * config.num_groups * config.chunk_size
    else:
        mamba += 4 * (10 * inner + 2 * config.mamba_num_heads * config.chunk_size)
    attention = 6 * config.num_attention_heads * config.head_dim * 4 + 2 * hidden * size
    mlp = 3 * config.intermediate_size * size + 2 * hidden * size
    layers = (
        (size + 2 * 4) * hidden,  # a norm, in float32
        mamba if config.num_mamba_layers else 0,
        mlp if config.num_mlp_layers else 0,
        attention if config.num_attention_layers else 0,
    )
    # Beside it the residual stream and the layer's input.
    pass_bytes = request.max_batch_tokens * (2 * hidden * size + max(layers))
    if request.precision.quantization is not Quantization.NONE:
        pass_bytes += INT8_SCRATCH_BYTES
    return pass_bytes


def _blocks(max_model_len: int, num_forced: int) -> int:
    return -(-(max_model_len + num_forced) // BLOCK_SIZE)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
