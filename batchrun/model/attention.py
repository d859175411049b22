"""The attention layer: causal, grouped queries, and no notion of position whatsoever."""

from __future__ import annotations

from torch import Tensor, nn

from batchrun.model.config import ModelConfig
from batchrun.model.layout import AttentionLayout
from batchrun.model.ops import Ops


class Attention(nn.Module):
    """Plain scaled dot-product attention. Order is known from the Mamba-2 layers around it.

    ``num_attention_heads / num_key_value_heads`` query heads share a key/value head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=bias)

    def forward(
        self, u: Tensor, layout: AttentionLayout, keys: Tensor, values: Tensor, ops: Ops
    ) -> Tensor:
        """[T, hidden] -> [T, hidden]; ``keys`` and ``values`` are this layer's pools, by block."""
        q = self.q_proj(u).unflatten(-1, (-1, self.head_dim))  # [T, heads, d]
        k = self.k_proj(u).unflatten(-1, (-1, self.head_dim))  # [T, kv heads, d]
        v = self.v_proj(u).unflatten(-1, (-1, self.head_dim))  # [T, kv heads, d]
        seen = ops.attention(q, k, v, keys, values, layout)  # [T, heads, d]
        out: Tensor = self.o_proj(seen.flatten(1))
        return out
