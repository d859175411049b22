"""The attention layer: causal, grouped queries, and no notion of position whatsoever."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchrun.model.config import ModelConfig
from batchrun.model.layout import AttentionLayout
from batchrun.model.ops import Ops
from batchrun.model.quantize import Int8Linear


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
        self.sizes = [q_size, kv_size, kv_size]
        self.qkv_proj: nn.Module | None = None
        """The three projections as one, when prepared."""
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=bias)

    def prepare(self) -> None:
        """Make one matrix of the three that share their input."""
        if self.qkv_proj is not None:
            return
        parts = (self.q_proj, self.k_proj, self.v_proj)
        modules: tuple[nn.Module, ...] = parts
        quantised = [part for part in modules if isinstance(part, Int8Linear)]
        if quantised:
            self.qkv_proj = Int8Linear.joined(quantised)
            del self.q_proj, self.k_proj, self.v_proj
            return
        weight = torch.cat([part.weight for part in parts])  # [heads + 2 kv heads * d, hidden]
        with torch.device("meta"):
            joined = nn.Linear(weight.shape[1], weight.shape[0], bias=self.q_proj.bias is not None)
        joined.weight = nn.Parameter(weight, requires_grad=False)
        if self.q_proj.bias is not None:
            bias = torch.cat([part.bias for part in parts])
            joined.bias = nn.Parameter(bias, requires_grad=False)
        self.qkv_proj = joined
        del self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, u: Tensor, layout: AttentionLayout, keys: Tensor, values: Tensor, ops: Ops
    ) -> Tensor:
        """[T, hidden] -> [T, hidden]; ``keys`` and ``values`` are this layer's pools, by block."""
        if self.qkv_proj is not None:
            projected = self.qkv_proj(u).split(self.sizes, dim=-1)
        else:
            projected = (self.q_proj(u), self.k_proj(u), self.v_proj(u))
        # q [T, heads, d], k and v [T, kv heads, d]; parts of one row, when they come from one.
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)
        seen = ops.attention(q, k, v, keys, values, layout)  # [T, heads, d]
        out: Tensor = self.o_proj(seen.flatten(1))
        return out
