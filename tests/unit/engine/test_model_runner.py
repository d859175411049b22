"""The batches that the model is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchrun.engine.engine import Engine
from batchrun.engine.memory import BLOCK_SIZE
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.model.batch import Batch, DecodeBatch
from tests.unit.engine.support import make_engine, run
from tests.unit.model.ops.batches import native_ops


def record(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches of all steps from now on, all of them as operators need them that follow no
    tables."""
    monkeypatch.setattr(engine.runner, "_follows_tables", False)
    model, batches = engine.runner.model, []

    def recording(batch: Batch, state: object) -> object:
        batches.append(batch)
        return model(batch, state)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.runner, "model", recording)
    return batches


def requests(*lengths: int) -> list[Request]:
    """Prompts of these lengths, each of one number of its own, 4 tokens to be sampled."""
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    return [Request(i, (20 + i,) * length, params) for i, length in enumerate(lengths)]


def test_decodes_stand_before_prefills_and_only_wanted_logits_are_made(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row a sequence that samples: none for the middle of a prompt."""
    engine = make_engine(random_folder, max_sequences=4, max_batch_tokens=8)
    batches = record(engine, monkeypatch)
    short, long = requests(3, 12)
    # More is expected of the short one, so it goes first.
    run(engine, [replace(short, params=replace(short.params, max_tokens=9)), long])
    first, second, third = batches[:3]
    assert (first.num_decodes, first.prefill_lens, first.context_lens) == (0, (3, 5), (0, 0))
    assert first.token_ids.tolist() == [20] * 3 + [21] * 5
    assert first.logit_rows.tolist() == [2]
    assert (second.num_decodes, second.prefill_lens, second.context_lens) == (1, (7,), (3, 5))
    assert second.logit_rows.tolist() == [0, 7]
    assert (third.num_decodes, third.prefill_lens, third.context_lens) == (2, (), (4, 12))


def test_decodes_alone_are_described_by_tensors(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the operators follow the tables, steps of decodes alone lay nothing out, and the
    outputs are the same."""
    native_ops()  # skips where the plain operators run
    outputs, kinds = [], []
    for follows in (True, False):
        engine = make_engine(random_folder, max_sequences=4, max_batch_tokens=8)
        assert engine.runner._follows_tables
        batches = record(engine, monkeypatch)
        monkeypatch.setattr(engine.runner, "_follows_tables", follows)
        done = run(engine, requests(3, 12, 5, 40, 2))
        outputs.append({key: output.token_ids for key, output in done.items()})
        kinds.append({type(batch) for batch in batches})
    assert outputs[0] == outputs[1]
    assert kinds == [{Batch, DecodeBatch}, {Batch}]


def test_slots_and_blocks_are_nobody_elses(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unique in every batch, never the scratch ones where there is something to hold."""
    engine = make_engine(random_folder, max_sequences=2)
    batches = record(engine, monkeypatch)
    run(engine, requests(200, 5, 90, 3, 40, 1))
    assert len(batches) > 8
    for batch in batches:
        slots = batch.slots.tolist()
        assert len(set(slots)) == len(slots) and 0 not in slots
        seen: list[int] = []
        lens = zip(batch.context_lens, batch.query_lens, batch.block_tables.tolist(), strict=True)
        for context, new, table in lens:
            held = -(-(context + new) // BLOCK_SIZE)
            assert 0 not in table[:held]
            seen += [block for block in table if block]
        assert len(set(seen)) == len(seen)


def test_a_table_shows_nothing_of_the_slots_last_sequence(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short sequence in the slot of a long one, beside one that makes the tables wide."""
    engine = make_engine(random_folder, max_sequences=2)
    batches = record(engine, monkeypatch)
    long, wide, short = requests(200, 150, 3)
    more = replace(wide.params, max_tokens=30)
    run(engine, [long, replace(wide, params=more), replace(short, params=more)])
    tables = [
        table
        for batch in batches
        for context, table in zip(batch.context_lens, batch.block_tables.tolist(), strict=True)
        if 0 < context <= 33 and len(table) > 2
    ]
    assert len(tables) > 10
    assert all(set(table[2:]) == {0} for table in tables)


def test_deterministic_passes_hold_one_sequence(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the shapes that a sequence is computed in are its own."""
    engine = make_engine(random_folder, deterministic=True, max_batch_tokens=8)
    batches = record(engine, monkeypatch)
    run(engine, requests(20, 3))
    assert {len(batch.slots) for batch in batches} == {1}
    chunks = [b.prefill_lens for b in batches if b.prefill_lens and b.token_ids[0] == 20]
    assert chunks == [(8,), (8,), (4,)]
