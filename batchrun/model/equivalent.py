"""A transformer of the same size as a hybrid, for comparisons in one engine."""

from __future__ import annotations

from dataclasses import replace

from batchrun.model.config import LayerKind, ModelConfig
from batchrun.model.sizes import count_weights

_MLP_RATIO = 4
"""Width of an MLP of two matrices over the hidden size, as transformers have it."""
_MULTIPLE = 8
"""Widths are multiples of it."""


def equivalent_transformer(config: ModelConfig) -> ModelConfig:
    """A model of attention and MLP layers in turn with as many weights as ``config``, within 1 %.

    Hidden size, vocabulary and the sizes of attention are the hybrid's. There are so many pairs of
    layers that an MLP is about four hidden sizes wide, and its width makes up the difference. For
    the 9B hybrid that is 36 pairs, and the same keys and values as those of common 8B
    transformers: 144 KiB a token in bfloat16.

    :raises ValueError: the hybrid has no attention layers whose sizes could be taken, or is so
        small that no such model has its size.
    """
    if not config.num_attention_layers:
        raise ValueError("the model has no attention layers, so their sizes are unknown")
    target = count_weights(config).total

    def total(num_pairs: int, intermediate_size: int) -> int:
        return count_weights(_pairs(config, num_pairs, intermediate_size)).total

    # The count is linear in the pairs, and in the width.
    width = _MLP_RATIO * config.hidden_size
    pair = total(2, width) - total(1, width)
    num_pairs = max(1, round((target - total(1, width)) / pair) + 1)
    step = total(num_pairs, _MULTIPLE + 1) - total(num_pairs, 1)
    width = _MULTIPLE * max(1, round((target - total(num_pairs, 1)) / step))
    made = _pairs(config, num_pairs, width)
    if abs(count_weights(made).total / target - 1) > 0.01:
        raise ValueError(f"no transformer of these sizes has about {target:,} weights")
    return made


def _pairs(config: ModelConfig, num_pairs: int, intermediate_size: int) -> ModelConfig:
    pattern = (LayerKind.ATTENTION + LayerKind.MLP) * num_pairs
    return replace(config, layer_pattern=pattern, intermediate_size=intermediate_size)
