"""What the model remembers between forward passes: pools shared by all sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchrun.model.config import ModelConfig
from batchrun.model.transfer import to_device

_BLOCKS_AT_ONCE = 64
"""Blocks copied at once: they are gathered first, and that takes their size in memory."""


@dataclass(frozen=True, slots=True)
class State:
    """The pools. M Mamba-2 layers, A attention layers; a sequence owns one slot and some blocks.

    ==========  ==================================================  ============
    ``conv``    [M, slots, conv_kernel - 1, conv_dim]               model dtype
    ``ssm``     [M, slots, mamba heads, head size, state size]      state dtype
    ``keys``    [A, blocks, block_size, kv heads, head_dim]         model dtype
    ``values``  as ``keys``                                         model dtype
    ==========  ==================================================  ============

    ``conv`` holds the last columns of x, B and C from before the convolution, oldest first. Slot 0
    and block 0 are scratch: padding rows write there, nobody reads them. Freeing and allocating
    is the caller's business and needs no clearing: a sequence that starts never reads its slot.
    """

    conv: Tensor
    ssm: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: torch.device | str,
    ) -> State:
        """Pools of ``num_slots`` slots and ``num_blocks`` blocks, the scratch ones included."""
        conv_shape = (
            config.num_mamba_layers,
            num_slots,
            config.conv_kernel - 1,
            config.conv_dim,
        )
        ssm_shape = (
            config.num_mamba_layers,
            num_slots,
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.ssm_state_size,
        )
        kv_shape = (
            config.num_attention_layers,
            num_blocks,
            block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        return cls(
            conv=torch.zeros(conv_shape, dtype=dtype, device=device),
            ssm=torch.zeros(ssm_shape, dtype=state_dtype, device=device),
            keys=torch.zeros(kv_shape, dtype=dtype, device=device),
            values=torch.zeros(kv_shape, dtype=dtype, device=device),
        )

    def copy(
        self, slot: int, blocks: Sequence[int], to_slot: int, to_blocks: Sequence[int]
    ) -> None:
        """Copy what a slot and its blocks hold, all of it: a part of a state is no state.

        ``to_blocks`` are as many as ``blocks``. Of the last block everything is copied, the rows
        behind the sequence's last token too; they are written before they are read.
        """
        if len(blocks) != len(to_blocks):
            raise ValueError(f"{len(blocks)} blocks cannot be copied to {len(to_blocks)}")
        self.conv[:, to_slot].copy_(self.conv[:, slot])
        self.ssm[:, to_slot].copy_(self.ssm[:, slot])
        device = self.keys.device
        for at in range(0, len(blocks), _BLOCKS_AT_ONCE):
            source = to_device(blocks[at : at + _BLOCKS_AT_ONCE], device)
            target = to_device(to_blocks[at : at + _BLOCKS_AT_ONCE], device)
            for pool in (self.keys, self.values):
                pool.index_copy_(1, target, pool.index_select(1, source))

    @property
    def num_slots(self) -> int:
        """Slots of the pool, the scratch slot 0 included."""
        return self.conv.shape[1]

    @property
    def num_blocks(self) -> int:
        """KV blocks of the pool, the scratch block 0 included."""
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return self.keys.shape[2]

    @property
    def size_bytes(self) -> int:
        """Memory of all pools."""
        return sum(pool.nbytes for pool in (self.conv, self.ssm, self.keys, self.values))
