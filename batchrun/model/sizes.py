"""How many weights a model has and what bytes they take. Pure arithmetic from the config.

One truth for the loader, the memory plan and the roofline: nothing is loaded, torch is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from batchrun.model.checkpoint import expected_tensors
from batchrun.model.config import ModelConfig

LINEARS = frozenset(
    {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
)
"""The matrices inside the layers, by the name of the module in a checkpoint."""

INT8_SCRATCH_BYTES = 32 << 20
"""Widened rows of a quantised matrix where there is no kernel that needs none: enough of them for a
matrix product to be efficient."""

_HEAD = "lm_head.weight"
_EMBEDDINGS = "backbone.embeddings.weight"


class Quantization(StrEnum):
    """How the matrices lie in memory; activations keep the model's dtype."""

    NONE = "none"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """Numbers of weights, by what happens to them.

    ``linears`` are the matrices inside the layers; ``time_steps`` of them are the rows of Mamba-2
    input projections that make dt, which are never quantised, because an error of dt multiplies
    over the whole sequence. ``head`` makes the logits: with tied embeddings it is ``embeddings``
    once more. ``others`` are norms, convolutions, biases and the like. ``channels`` are the rows
    of all matrices that can be quantised: each has a scale.
    """

    linears: int
    time_steps: int
    head: int
    embeddings: int
    others: int
    channels: int
    is_tied: bool

    @property
    def total(self) -> int:
        """Weights of the checkpoint."""
        return self.linears + self.embeddings + self.others + (0 if self.is_tied else self.head)

    def memory_bytes(self, dtype_bytes: int, quantization: Quantization) -> int:
        """Bytes that the loaded model takes."""
        if quantization is Quantization.NONE:
            return self.total * dtype_bytes
        # Tied embeddings stay as they are for the lookup, beside the quantised head.
        return self.embeddings * dtype_bytes + self.step_bytes(dtype_bytes, quantization)

    def step_bytes(self, dtype_bytes: int, quantization: Quantization) -> int:
        """Bytes of weights that one forward pass reads: all but the embeddings, of which it takes
        a row a token."""
        if quantization is Quantization.NONE:
            return (self.linears + self.head + self.others) * dtype_bytes
        wide = self.time_steps + self.channels + self.others
        return self.linears - self.time_steps + self.head + wide * dtype_bytes


def count_weights(config: ModelConfig) -> WeightCounts:
    """Count the weights of a model of this config."""
    linears = others = channels = 0
    for name, shape in expected_tensors(config).items():
        if is_linear(name):
            linears += prod(shape)
            channels += shape[0]
        elif name not in (_EMBEDDINGS, _HEAD):
            others += prod(shape)
    num_time_steps = config.num_mamba_layers * config.mamba_num_heads
    embeddings = config.vocab_size * config.hidden_size
    return WeightCounts(
        linears=linears,
        time_steps=num_time_steps * config.hidden_size,
        head=embeddings,
        embeddings=embeddings,
        others=others,
        channels=channels - num_time_steps + config.vocab_size,
        is_tied=config.tie_word_embeddings,
    )


def is_linear(name: str) -> bool:
    """Whether a checkpoint's tensor is a matrix inside a layer."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in LINEARS


@dataclass(frozen=True, slots=True)
class Precision:
    """What numbers are held in, as sizes.

    ``dtype_bytes`` of a weight or activation, and of keys, values and conv states;
    ``state_dtype_bytes`` of the SSM state; and whether the matrices are quantised.
    """

    dtype_bytes: int = 2
    state_dtype_bytes: int = 4
    quantization: Quantization = Quantization.NONE

    def weight_bytes(self, config: ModelConfig) -> int:
        """Bytes of a loaded model."""
        return count_weights(config).memory_bytes(self.dtype_bytes, self.quantization)

    def slot_bytes(self, config: ModelConfig) -> int:
        """Bytes of the conv and SSM state of a sequence, whatever its length."""
        return (
            config.conv_state_elements * self.dtype_bytes
            + config.ssm_state_elements * self.state_dtype_bytes
        )

    def token_bytes(self, config: ModelConfig) -> int:
        """Bytes of keys and values that a token adds."""
        return config.kv_elements_per_token * self.dtype_bytes
