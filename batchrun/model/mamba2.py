"""The Mamba-2 layer: a short convolution and a linear recurrence over the sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchrun.model.config import ModelConfig
from batchrun.model.layout import Layout
from batchrun.model.ops import Ops


class GatedNormWeight(nn.Module):
    """Holds the weight of the norm inside a Mamba-2 layer, under the name checkpoints give it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Mamba2Mixer(nn.Module):
    """One token u at a time, the layer computes, for every head with its state S [p, n]::

        z, x|B|C, dt = in_proj(u)
        x|B|C        = silu(conv(x|B|C))          the last K columns of every channel
        dt           = softplus(dt + dt_bias)     A = -exp(A_log)
        S            = exp(dt A) S + dt x (outer) B
        y            = S C + D x
        out          = out_proj(norm(y * silu(z)) * weight)

    B and C are shared by the heads of a group, and the norm is over the channels of a group.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        hidden, bias = config.hidden_size, config.mamba_proj_bias
        self.in_proj = nn.Linear(hidden, config.mamba_proj_size, bias=bias)
        # Its weight [conv_dim, 1, K] and bias are used by the operators; it is never called.
        self.conv1d = nn.Conv1d(
            config.conv_dim,
            config.conv_dim,
            config.conv_kernel,
            groups=config.conv_dim,
            bias=config.use_conv_bias,
        )
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedNormWeight(inner)
        self.out_proj = nn.Linear(inner, hidden, bias=bias)
        self._A: Tensor | None = None

    def prepare(self) -> None:
        """Work out what depends on weights alone, and lay out the convolution's column by column:
        that is how the operators read it."""
        self._A = -torch.exp(self.A_log.float())
        weight = self.conv1d.weight  # [conv_dim, 1, K], in memory [K, conv_dim] from now on
        weight.data = weight.data.squeeze(1).t().contiguous().t().unsqueeze(1)

    def forward(self, u: Tensor, layout: Layout, conv: Tensor, ssm: Tensor, ops: Ops) -> Tensor:
        """[T, hidden] -> [T, hidden]; ``conv`` and ``ssm`` are this layer's pools, by slot."""
        config = self.config
        inner = config.mamba_inner_size
        projected = self.in_proj(u)  # [T, inner + conv_dim + heads]
        z, x_B_C, dt = projected.split([inner, config.conv_dim, config.mamba_num_heads], dim=-1)

        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias  # [conv_dim, K]
        A = -torch.exp(self.A_log.float()) if self._A is None else self._A  # [h]
        outputs = []
        num_decodes = layout.num_decodes
        if num_decodes:
            mixed = ops.conv_update(x_B_C[:num_decodes], weight, bias, conv, layout.decode_slots)
            x, B, C = self._split(mixed)
            outputs.append(
                ops.ssm_update(
                    x, dt[:num_decodes], B, C, A, self.dt_bias, self.D, ssm, layout.decode_slots
                )
            )
        if layout.prefill is not None:
            mixed = ops.causal_conv(x_B_C[num_decodes:], weight, bias, conv, layout.prefill)
            x, B, C = self._split(mixed)
            outputs.append(
                ops.ssd_scan(
                    x, dt[num_decodes:], B, C, A, self.dt_bias, self.D, ssm, layout.prefill
                )
            )
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [T, h, p]
        y = y.view(len(u), inner)
        group_size = inner // config.num_groups
        y = ops.gated_norm(y, z, self.norm.weight, group_size, config.norm_eps)
        out: Tensor = self.out_proj(y)
        return out

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, conv_dim] -> x [T, h, p], B [T, g, n], C [T, g, n]."""
        config = self.config
        inner, groups, size = config.mamba_inner_size, config.num_groups, config.ssm_state_size
        x, B, C = torch.split(mixed, [inner, groups * size, groups * size], dim=-1)
        return (
            x.view(len(x), config.mamba_num_heads, config.mamba_head_dim),
            B.view(len(x), groups, size),
            C.view(len(x), groups, size),
        )
