"""Recorded decode steps give what steps that are not recorded give.

On a CPU a recording is a function that is called again; what it reads and writes is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from batchrun.engine.engine import Engine
from batchrun.engine.graphs import bucket_sizes
from batchrun.engine.memory import plan_memory
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.model.batch import Batch, DecodeBatch
from batchrun.model.hybrid import NemotronH
from batchrun.model.ops.plain import PlainOps
from batchrun.model.state import State
from tests.unit.engine.support import make_engine, run
from tests.unit.model.models import SMALL


class CallingRecorder:
    """Runs what it recorded; ``replayed`` lists which recording was used, in order of making."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.replayed: list[int] = []

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        number, self.num_recorded = self.num_recorded, self.num_recorded + 1

        def replay() -> None:
            self.replayed.append(number)
            run()

        return replay


def requests(*lengths: int, **params: object) -> list[Request]:
    """Prompts of these lengths, and outputs of different ones."""
    return [
        Request(
            i,
            tuple((7 * i + 3 * j) % 90 + 20 for j in range(length)),
            SamplingParams(max_tokens=5 + 3 * i, ignore_eos=True, **params),  # type: ignore[arg-type]
            seed=i,
        )
        for i, length in enumerate(lengths)
    ]


def poison(engine: Engine) -> None:
    """Fill scratch slot and scratch block with NaN."""
    state = engine.runner.state
    for pool in (state.conv, state.ssm, state.keys, state.values):
        pool[:, 0] = torch.nan


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (5, (1, 2, 4, 5)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
        (25, (1, 2, 4, 8, 16, 24, 25)),
    ],
)
def test_bucket_sizes(most: int, sizes: tuple[int, ...]) -> None:
    """Close to one another where sequences are few, every eighth beyond, and never past the most
    that can run."""
    assert bucket_sizes(most) == sizes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_steps_generate_the_same(random_folder: Path, temperature: float) -> None:
    """Sequences that come and go through all sizes, in slots that others left, beside padding
    rows on a scratch slot of NaN: token for token the same as without recordings."""
    wanted = requests(40, 3, 1, 70, 9, 33, 2, temperature=temperature)
    expected = run(make_engine(random_folder, max_sequences=5), wanted)
    engine, recorder = make_engine(random_folder, max_sequences=5), CallingRecorder()
    engine.runner.record(recorder)
    poison(engine)
    outputs = run(engine, wanted)
    assert recorder.num_recorded == 4  # 5, 4, 2, 1
    assert set(recorder.replayed) == {0, 1, 2, 3}
    for key, output in expected.items():
        assert outputs[key].token_ids == output.token_ids


def test_steps_with_prompts_are_not_replayed(random_folder: Path) -> None:
    """A recording is of decodes alone; what is mixed is run as it is."""
    engine, recorder = make_engine(random_folder, max_sequences=2), CallingRecorder()
    engine.runner.record(recorder)
    engine.add(requests(5)[0])
    engine.step()
    assert recorder.replayed == []
    engine.step()
    assert recorder.replayed == [1]
    engine.add(Request("late", (30, 31), SamplingParams(max_tokens=2, ignore_eos=True)))
    engine.step()
    assert recorder.replayed == [1]
    engine.step()
    assert recorder.replayed == [1, 0]


def test_warming_up_writes_to_scratch_alone(random_folder: Path) -> None:
    """The steps by which kernels are compiled leave every slot and block but the scratch ones, and
    a CPU has none of them; what compiling takes is a part of what loading takes."""
    engine = make_engine(random_folder, max_sequences=2)
    runner = engine.runner
    pools = (runner.state.conv, runner.state.ssm, runner.state.keys, runner.state.values)
    runner.warm_up(100)
    assert all(pool.isnan().all() for pool in pools)
    with torch.inference_mode():
        runner._run_scratch((50, 1))
    assert all(pool[:, 1:].isnan().all() for pool in pools)
    assert not runner.state.ssm[:, 0].isnan().any()
    assert 0 <= engine.compile_seconds <= engine.load_seconds


def test_deterministic_engines_record_one_size(random_folder: Path) -> None:
    """Each sequence has its own pass, with the same bits as without recordings."""
    options = {"deterministic": True, "max_sequences": 3}
    wanted = requests(12, 5, 8)
    expected = run(make_engine(random_folder, **options), wanted)
    engine, recorder = make_engine(random_folder, **options), CallingRecorder()
    engine.runner.record(recorder)
    outputs = run(engine, wanted)
    assert recorder.num_recorded == 1 and len(recorder.replayed) > 10
    assert {k: o.token_ids for k, o in outputs.items()} == {
        k: o.token_ids for k, o in expected.items()
    }


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_logits_of_recorded_steps_are_in_the_plan(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """As a row of the table, to the byte, and in what the engine may use."""
    engine = make_engine(random_folder, deterministic=deterministic, max_sequences=5)
    engine.runner.record(CallingRecorder())
    assert engine.runner._graphs is not None
    monkeypatch.setattr("batchrun.engine.options.find_obstacle", lambda: None)
    options = replace(engine.options, device="cuda", dtype="float32", memory_bytes=1 << 30)
    request = options.memory_request(num_forced=0)
    plan = plan_memory(engine.config, request)
    logits = [row.size_bytes for row in plan.table if row.name == "logits of recorded steps"]
    assert logits == [engine.runner._graphs._logits.nbytes]
    without = plan_memory(engine.config, replace(request, recorded_sequences=0))
    assert plan.used_bytes == without.used_bytes + logits[0]
    assert engine.memory.recorded_logit_bytes == 0  # a CPU records nothing


def test_a_replay_reads_where_the_recording_read(random_folder: Path) -> None:
    """Inputs are refreshed in place for every step and padded anew; addresses never change."""
    engine, recorder = make_engine(random_folder, max_sequences=3), CallingRecorder()
    seen: dict[int, set[tuple[int, ...]]] = {}
    rows: list[tuple[list[int], list[int]]] = []
    model = engine.runner.model

    def recording(batch: DecodeBatch | Batch, state: object) -> torch.Tensor:
        if isinstance(batch, DecodeBatch):
            tensors = (batch.token_ids, batch.slots, batch.context_lens)
            seen.setdefault(len(batch.slots), set()).add(tuple(t.data_ptr() for t in tensors))
            rows.append((batch.slots.tolist(), batch.context_lens.tolist()))
        return model(batch, state)  # type: ignore[no-any-return, arg-type]

    recording.config = model.config  # type: ignore[attr-defined]
    engine.runner.model = recording  # type: ignore[assignment]
    engine.runner.record(recorder)
    assert rows == [([0] * size, [1] * size) for size in (3, 2, 1)]
    run(engine, requests(9, 4, 6))
    assert seen.keys() == {1, 2, 3}
    assert all(len(addresses) == 1 for addresses in seen.values())
    slots = [row[0] for row in rows[3:]]
    assert any(len(row) > 1 and row[-1] != 0 for row in slots)
    for row, contexts in rows[3:]:
        live = [slot for slot in row if slot]
        assert len(set(live)) == len(live) and live
        assert all(context == 1 for slot, context in zip(row, contexts, strict=True) if not slot)


@pytest.mark.parametrize("rectangles", [True, False])
def test_a_decode_step_waits_for_no_number_of_the_device(rectangles: bool) -> None:
    """With tensors that have shapes and no contents the whole model can be run, so nothing in it
    looks at a number; that is what a graph can be made of."""

    class Operators(PlainOps):
        def attention(self, q, k, v, keys, values, layout):  # type: ignore[no-untyped-def]
            return super().attention(q, k, v, keys, values, layout) if rectangles else q + k[:, :1]

    Operators.rectangles = rectangles
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = NemotronH(SMALL, Operators())
        state = State.allocate(SMALL, 3, 5, 4, torch.float32, torch.float32, "cpu")
        integers = torch.ones(4, dtype=torch.int64)
        batch = DecodeBatch(integers, integers, integers, torch.ones(4, 3, dtype=torch.int64))
        logits = model(batch, state)
        assert logits.shape == (4, SMALL.vocab_size)
        with pytest.raises(DataDependentOutputException):
            integers.sum().item()
