"""Decodes that are described on the device alone: the same logits and states as any other way."""

from __future__ import annotations

import torch

from batchrun.model.batch import DecodeBatch
from batchrun.model.ops.plain import PlainOps
from tests.unit.model.models import SMALL, Driver, assert_close, random_model, random_tokens

TOLERANCE = 2e-5


def test_decodes_described_on_the_device_equal_others() -> None:
    """Ragged contexts, padding rows at the end, tables wider than needed: the same logits and the
    same state, and the slots of others keep every bit."""
    drivers = [Driver(random_model()) for _ in range(2)]
    lengths = {"a": 3, "b": 37, "c": 1, "idle": 5}
    for driver in drivers:
        for name, length in lengths.items():
            driver.step(prefills={name: random_tokens(SMALL, length)})
    names, (driver, other) = list("bca"), drivers
    fed = [7, 8, 9]
    expected = other.step(decodes=dict(zip(names, fed, strict=True)))
    slots = [driver.slots[name] for name in names]
    tables = torch.zeros(5, driver.blocks_per_slot, dtype=torch.int64)
    tables[:3] = driver.tables[slots]
    batch = DecodeBatch(
        token_ids=torch.tensor([*fed, 0, 0]),
        slots=torch.tensor([*slots, 0, 0]),
        context_lens=torch.tensor([*(lengths[name] for name in names), 1, 1]),
        block_tables=tables,
    )
    logits = driver.model(batch, driver.state)
    for row, name in enumerate(names):
        assert_close(logits[row : row + 1], expected[name], TOLERANCE)
    for pool, reference in zip(
        (driver.state.conv, driver.state.ssm, driver.state.keys, driver.state.values),
        (other.state.conv, other.state.ssm, other.state.keys, other.state.values),
        strict=True,
    ):
        assert torch.equal(pool[:, 1:].isnan(), reference[:, 1:].isnan())
        assert_close(pool[:, 1:].nan_to_num(), reference[:, 1:].nan_to_num(), TOLERANCE)


def test_the_layout_of_such_a_batch_reads_nothing_back() -> None:
    """With kernels that follow the tables there is nothing whose shape depends on contents."""

    class Operators(PlainOps):
        rectangles = False

        def attention(self, q, k, v, keys, values, layout):  # type: ignore[no-untyped-def]
            assert layout.groups == () and layout.longest_prefill == 0
            assert layout.starts.tolist() == [0, 1, 2] and layout.contexts.tolist() == [4, 1]
            return q

    driver = Driver(random_model())
    driver.model.ops = Operators()
    zeros = torch.zeros(2, dtype=torch.int64)
    contexts, tables = torch.tensor([4, 1]), torch.zeros(2, 3, dtype=torch.int64)
    assert len(driver.model(DecodeBatch(zeros, zeros, contexts, tables), driver.state)) == 2
