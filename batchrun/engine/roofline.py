"""How fast a device can be at most: bytes it must read, operations it must do. Pure arithmetic.

Upper bounds: all of the bandwidth, all of the arithmetic, no gaps. A step takes as long as the
slower of the two; prefill and decode do not overlap. Counted are the bytes of weights, states, keys
and values, and the operations of matrices, scan and attention; everything else is small beside
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from batchrun.engine.accelerators import Accelerator
from batchrun.model.config import ModelConfig
from batchrun.model.sizes import Precision, count_weights


class Bound(StrEnum):
    """What a device waits for."""

    BANDWIDTH = "bandwidth"
    ARITHMETIC = "arithmetic"


@dataclass(frozen=True, slots=True)
class Work:
    """What something takes: bytes to be read and written, operations to be done."""

    num_bytes: float
    num_operations: float

    def seconds(self, device: Accelerator) -> float:
        """The least time on ``device``."""
        return max(self.num_bytes / device.bandwidth, self.num_operations / device.flops)

    def bound(self, device: Accelerator) -> Bound:
        """What ``device`` waits for."""
        is_reading = self.num_bytes / device.bandwidth >= self.num_operations / device.flops
        return Bound.BANDWIDTH if is_reading else Bound.ARITHMETIC

    def __add__(self, other: Work) -> Work:
        return Work(self.num_bytes + other.num_bytes, self.num_operations + other.num_operations)


def decode_work(config: ModelConfig, precision: Precision, batch: int, context: float) -> Work:
    """A step that decodes one token of each of ``batch`` sequences of ``context`` tokens.

    Weights are read once; the state of each sequence is read and written, its keys and values are
    read.
    """
    counts = count_weights(config)
    per_sequence = 2 * precision.slot_bytes(config) + precision.token_bytes(config) * context
    operations = (
        2 * (counts.linears + counts.head)
        + 6 * config.ssm_state_elements  # decay, add the product of x and B, multiply by C
        + _attention_operations(config) * context
    )
    weights = counts.step_bytes(precision.dtype_bytes, precision.quantization)
    return Work(weights + batch * per_sequence, batch * operations)


def prefill_work(config: ModelConfig, precision: Precision, num_tokens: int) -> Work:
    """A prompt of ``num_tokens``, in as few steps as can be; logits are made of its last token, and
    MLPs behind the last layer with a state see no other one."""
    counts = count_weights(config)
    chunk = min(config.chunk_size, num_tokens)
    groups = config.num_mamba_layers * config.num_groups * config.ssm_state_size
    inner = config.num_mamba_layers * config.mamba_inner_size
    # In chunks: C.B, its product with x, the states of chunks, and what they give to the outputs.
    scan = 2 * chunk * (groups + inner) + 4 * config.ssm_state_elements
    last = _last_layers(config)
    per_token = 2 * (counts.linears - last) + scan + _attention_operations(config) * num_tokens / 2
    weights = counts.step_bytes(precision.dtype_bytes, precision.quantization)
    state = 2 * precision.slot_bytes(config) + precision.token_bytes(config) * num_tokens
    return Work(weights + state, num_tokens * per_token + 2 * (counts.head + last))


@dataclass(frozen=True, slots=True)
class Speed:
    """Bounds of a device in a steady state: ``batch`` sequences always decode, each generates
    ``output_tokens`` after ``input_tokens``, a new one begins where one ends."""

    batch: int
    input_tokens: int
    output_tokens: int
    step: Work
    step_seconds: float
    prefill_seconds: float
    bound: Bound

    @property
    def decode_rate(self) -> float:
        """Output tokens a second while nothing but decoding is done."""
        return self.batch / self.step_seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second while nothing but prefill is done."""
        return self.input_tokens / self.prefill_seconds

    @property
    def row_seconds(self) -> float:
        """Time of the device that a row takes, prompt and output."""
        return self.prefill_seconds + self.output_tokens * self.step_seconds / self.batch

    @property
    def output_rate(self) -> float:
        """Output tokens a second, prefill included."""
        return self.output_tokens / self.row_seconds


def predict(
    config: ModelConfig,
    precision: Precision,
    device: Accelerator,
    *,
    batch: int,
    input_tokens: int,
    output_tokens: int,
) -> Speed:
    """The bounds for rows of these lengths, ``batch`` of them at once.

    ``batch``, ``input_tokens`` and ``output_tokens`` are at least 1. Sequences are taken to be at
    all places of their outputs, half of it on average.
    """
    step = decode_work(config, precision, batch, input_tokens + output_tokens / 2)
    return Speed(
        batch=batch,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        step=step,
        step_seconds=step.seconds(device),
        prefill_seconds=prefill_seconds(config, precision, device, input_tokens),
        bound=step.bound(device),
    )


def prefill_seconds(
    config: ModelConfig, precision: Precision, device: Accelerator, num_tokens: int
) -> float:
    """The least time of a prompt's prefill. Prompts that arrive together share the weights that
    are read, so their bytes are not counted."""
    return prefill_work(config, precision, num_tokens).num_operations / device.flops


class StepBound:
    """The least time of any step of an engine on ``device``, decodes and chunks of prompts mixed.

    Worked out once; a step is a few multiplications then.
    """

    def __init__(self, config: ModelConfig, precision: Precision, device: Accelerator) -> None:
        self._device = device
        chunk = config.chunk_size
        prompt = prefill_work(config, precision, chunk)
        head = 2 * (count_weights(config).head + _last_layers(config))
        self._weights = decode_work(config, precision, 0, 0)
        self._decode = _minus(decode_work(config, precision, 1, 0), self._weights)
        one_more = _minus(decode_work(config, precision, 1, 1), self._weights)
        self._seen = _minus(one_more, self._decode)
        self._chunk = Work(self._decode.num_bytes, head)
        self._prompt_token = Work(
            precision.token_bytes(config), (prompt.num_operations - head) / chunk
        )

    def seconds(self, *, decodes: int, chunks: int, prompt_tokens: int, seen_tokens: int) -> float:
        """The least time of a step: a token of each of ``decodes`` sequences, ``chunks`` of other
        ones with ``prompt_tokens`` together. ``seen_tokens`` are those that the decoded ones
        attend to, summed over them."""
        parts = (
            (1, self._weights),
            (decodes, self._decode),
            (seen_tokens, self._seen),
            (chunks, self._chunk),
            (prompt_tokens, self._prompt_token),
        )
        return Work(
            sum(count * work.num_bytes for count, work in parts),
            sum(count * work.num_operations for count, work in parts),
        ).seconds(self._device)


def _minus(work: Work, other: Work) -> Work:
    return Work(work.num_bytes - other.num_bytes, work.num_operations - other.num_operations)


def _last_layers(config: ModelConfig) -> int:
    """Weights of the matrices behind the last layer that keeps a state."""
    num_mlps = config.num_layers - config.num_layers_to_last_state
    return num_mlps * 2 * config.hidden_size * config.intermediate_size


def _attention_operations(config: ModelConfig) -> int:
    """For each token and each token it sees: products of queries with keys, and with values."""
    return 4 * config.num_attention_layers * config.num_attention_heads * config.head_dim
