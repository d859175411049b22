"""Small random models, and a driver that feeds them sequences as an engine does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from batchrun.model.batch import Batch
from batchrun.model.config import ModelConfig
from batchrun.model.hybrid import NemotronH
from batchrun.model.state import State

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=40,
    layer_pattern="MM*-M*-",
    intermediate_size=72,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    mamba_num_heads=6,
    mamba_head_dim=10,
    ssm_state_size=12,
    num_groups=3,
    chunk_size=8,
)
"""No size is the product of others, groups and heads differ, Mamba-2 layers are neighbours."""


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that make every part matter: time steps from far below 0.001 to about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        parameter.requires_grad_(False)
        if name.endswith("A_log"):
            parameter.uniform_(-1, 2.5, generator=generator)
        elif name.endswith("dt_bias"):
            parameter.uniform_(-9, 1, generator=generator)
        elif parameter.dim() == 1:
            parameter.normal_(0, 0.2, generator=generator)
            parameter += 0 if name.endswith("bias") else 1
        else:
            parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5, generator=generator)


def random_model(config: ModelConfig = SMALL, seed: int = 0) -> NemotronH:
    """A model with random weights, ready for inference."""
    model = NemotronH(config).eval()
    randomize(model, seed)
    return model


def random_tokens(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()


@dataclass
class Driver:
    """Runs sequences by name over one :class:`State` whose memory is NaN before its first use.

    Each sequence has its slot and, in random order, its blocks. ``step`` packs them as an engine
    does: decodes first, then prefills.
    """

    model: NemotronH
    num_slots: int = 6
    blocks_per_slot: int = 24
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    state: State = field(init=False)
    slots: dict[str, int] = field(default_factory=dict)
    contexts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_blocks = self.num_slots * self.blocks_per_slot
        self.state = State.allocate(
            self.model.config,
            self.num_slots,
            num_blocks + 1,
            self.block_size,
            self.dtype,
            self.state_dtype,
            "cpu",
        )
        for pool in (self.state.conv, self.state.ssm, self.state.keys, self.state.values):
            pool.fill_(torch.nan)
        shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = shuffled.view(self.num_slots, self.blocks_per_slot)

    def start(self, name: str) -> None:
        """Give a new sequence the highest free slot; its content stays what it was."""
        taken = set(self.slots.values())
        free = next(slot for slot in range(self.num_slots - 1, 0, -1) if slot not in taken)
        self.slots[name], self.contexts[name] = free, 0

    def finish(self, name: str) -> None:
        """Free the slot of a sequence."""
        del self.slots[name], self.contexts[name]

    def step(
        self,
        decodes: Mapping[str, int] | None = None,
        prefills: Mapping[str, Sequence[int]] | None = None,
        padding_rows: int = 0,
    ) -> dict[str, Tensor]:
        """Logits [its new tokens, vocab] of each sequence; unknown names are started."""
        decodes, prefills = decodes or {}, prefills or {}
        for name in prefills:
            if name not in self.slots:
                self.start(name)
        padding = [0] * padding_rows
        tokens = [*decodes.values(), *padding, *(t for ids in prefills.values() for t in ids)]
        names: list[str | None] = [*decodes, *[None] * padding_rows, *prefills]
        tables = [
            torch.zeros_like(self.tables[0]) if name is None else self.tables[self.slots[name]]
            for name in names
        ]
        batch = Batch(
            token_ids=torch.tensor(tokens),
            num_decodes=len(decodes) + padding_rows,
            prefill_lens=tuple(len(ids) for ids in prefills.values()),
            slots=torch.tensor([0 if name is None else self.slots[name] for name in names]),
            context_lens=tuple(1 if name is None else self.contexts[name] for name in names),
            block_tables=torch.stack(tables),
            logit_rows=torch.arange(len(tokens)),
        )
        logits = self.model(batch, self.state).split(batch.query_lens)
        result = {name: rows for name, rows in zip(names, logits, strict=True) if name is not None}
        for name, rows in result.items():
            self.contexts[name] += len(rows)
        return result

    def run(self, tokens: Sequence[int], cuts: Sequence[int] = ()) -> Tensor:
        """Logits [tokens, vocab] of one sequence alone, prefilled in pieces cut at ``cuts``."""
        logits = [
            self.step(prefills={"alone": tokens[begin:end]})["alone"]
            for begin, end in pairwise([0, *cuts, len(tokens)])
        ]
        self.finish("alone")
        return torch.cat(logits)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to ``tolerance`` in absolute terms, and free of NaN."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error < tolerance
