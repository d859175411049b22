"""The small layers: the norm that stands before every layer, and the MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchrun.model.config import ModelConfig


class RMSNorm(nn.Module):
    """The weight and the epsilon of a norm; :meth:`Ops.add_norm` computes it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class MLP(nn.Module):
    """``down(relu(up(x))^2)``: two matrices and no gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        inner = self.up_proj(x).relu_()  # [T, intermediate]
        out: Tensor = self.down_proj(inner.mul_(inner))
        return out
