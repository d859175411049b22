"""Batches without a model, and the compiled operators."""

from __future__ import annotations

import pytest
import torch

from batchrun.model.batch import Batch
from batchrun.model.ops.build import NoCompiler, load_library
from batchrun.model.ops.native import NativeOps


def native_ops() -> NativeOps:
    """The compiled operators; skips the test where there is no compiler."""
    try:
        return NativeOps(load_library())
    except NoCompiler as error:
        pytest.skip(str(error))


def make_batch(
    decodes: tuple[int, ...],
    prefill_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    blocks_each: int = 24,
) -> Batch:
    """``context_lens`` begins with ``decodes``, the contexts of the decodes. Places are shuffled;
    up to 11 sequences have slots from 1 to 11."""
    generator = torch.Generator().manual_seed(2)
    num_sequences = len(decodes) + len(prefill_lens)
    blocks = torch.randperm(num_sequences * blocks_each, generator=generator) + 1
    return Batch(
        token_ids=torch.zeros(len(decodes) + sum(prefill_lens), dtype=torch.long),
        num_decodes=len(decodes),
        prefill_lens=prefill_lens,
        slots=torch.randperm(max(11, num_sequences), generator=generator)[:num_sequences] + 1,
        context_lens=context_lens,
        block_tables=blocks.view(num_sequences, blocks_each),
        logit_rows=torch.tensor([0]),
    )
