"""A step that runs while the one before is taken in: the same outputs, one call later.

On a CPU a pass is computed when it is launched; what it samples is looked at no earlier than on a
GPU, so the order of things is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from batchrun.engine.engine import Engine
from batchrun.engine.graphs import IN_FLIGHT
from batchrun.engine.model_runner import Drawn, ModelRunner, NextToken, Pass
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request
from batchrun.engine.sampler import Needs, Sampling
from batchrun.engine.scheduler import Step
from batchrun.engine.thinking import ForcedClose
from batchrun.model.hybrid import NemotronH
from batchrun.model.ops.plain import PlainOps
from batchrun.records import FinishReason, Generated, Message
from tests.unit.engine.support import TINY, make_engine, run, run_one

FORMATS = (
    {"type": "regex", "pattern": "[0-9]{1,12}"},
    {"type": "choice", "choices": ["yes", "no", "10 or so"]},
    {
        "type": "json_schema",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
)
Outputs = dict[tuple[object, int], Output]


def mixed(engine: Engine, rng: Random) -> list[Request]:
    """Questions in the chat format and prompts of random ids, many of which begin alike, with all
    parameters, each in 1 to 3 samples."""
    assert engine.chat is not None
    shared = tuple(rng.randrange(20, 400) for _ in range(90))
    made = []
    for key in range(14):
        thinking = rng.random() < 0.6
        if rng.random() < 0.5:
            terms = "+".join(str(rng.randint(1, 99)) for _ in range(rng.randint(2, 4)))
            message = Message("user", f"What is {terms}?")
            prompt = engine.chat.encode([message], reasoning=thinking).token_ids
        else:
            own = tuple(rng.randrange(20, 400) for _ in range(rng.choice([1, 2, 17, 60])))
            prompt = rng.choice([(), shared, shared]) + own
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 3, 20, 45]),
            temperature=rng.choice([0.0, 0.8, 1.2]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            max_thinking_tokens=rng.choice([None, 0, 1, 5, 17]),
            thinking_grace=rng.choice([0, 0, 4]),
            stop=rng.choice([[], ["1"], ["e", "0"]]),
            min_tokens=rng.choice([0, 1]),
            ignore_eos=rng.random() < 0.3,
            logprobs=0,
            response_format=rng.choice([None, None, *FORMATS]),
        )
        made += [
            Request(key, prompt, params, seed=key, sample=sample, thinking=thinking)
            for sample in range(rng.choice([1, 1, 3]))
        ]
    return made


def drive(
    engine: Engine, requests: list[Request], seed: int, num_aborted: int
) -> tuple[Outputs, Outputs]:
    """Run requests that come over time, some of which go again; the outputs of those that stay,
    and of those others that had ended before they were to go.

    After every step nothing is lost or held twice, and what the engine says of its running samples
    is the beginning of what they come to in the end.
    """
    rng = Random(seed)
    keys = rng.sample(range(14), 14)
    order = [request for key in keys for request in requests if request.key == key]
    aborted = set(rng.sample(range(14), num_aborted))
    outputs: Outputs = {}
    seen: dict[tuple[object, int], list[Generated]] = {}
    pending = list(aborted)
    while order or engine.num_unfinished:
        for _ in range(min(len(order), rng.choice([0, 0, 1, 5]))):
            engine.add(order.pop())
        for output in engine.step():
            assert (output.key, output.sample) not in outputs
            outputs[output.key, output.sample] = output
        engine.check_integrity()
        for item in engine.running():
            seen.setdefault((item.key, item.sample), []).append(item.after(0))
        if not order and pending and rng.random() < 0.2:
            engine.abort(pending.pop())
            engine.check_integrity()
    for place, output in outputs.items():
        for known in seen.get(place, ()):
            count = len(known.token_ids)
            assert known.token_ids == output.generated.token_ids[:count]
            assert known.closed_after in (None, output.generated.closed_after)
    stats = engine.stats()
    assert (stats.slots_used, stats.blocks_used) == (0, 0)
    stay = {place: output for place, output in outputs.items() if place[0] not in aborted}
    return stay, {place: output for place, output in outputs.items() if place[0] in aborted}


def assert_same(one: Output, other: Output) -> None:
    """Equal but for times and what came from snapshots, log-probabilities within rounding."""
    bare = {"timings": one.timings, "logprobs": None, "prefix_tokens": 0}
    assert replace(one, **bare) == replace(other, **bare)  # type: ignore[arg-type]
    for mine, its in zip(one.logprobs or (), other.logprobs or (), strict=True):
        assert mine is its is None or abs((mine or 0) - (its or 0)) < 1e-4


class CallingRecorder:
    """Where there are no CUDA graphs: what was recorded is called again."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run


@pytest.fixture(scope="module", params=["tiny", "random"])
def engines(request: pytest.FixtureRequest, random_folder: Path) -> tuple[Engine, Engine]:
    """One whose steps overlap, those of the random model recorded too, and one whose do not; few
    slots, and small steps."""
    folder = TINY if request.param == "tiny" else random_folder
    options = {"max_sequences": 5, "max_batch_tokens": 64}
    one, other = (make_engine(folder, overlap=overlap, **options) for overlap in (True, False))
    if request.param == "random":
        one.runner.record(CallingRecorder())
    return one, other


def cut(request: Request, output: Output, rng: Random) -> Request:
    """The same with some of what it samples known beforehand."""
    known, count = output.generated, rng.randint(0, len(output.generated.token_ids))
    closed = known.closed_after
    assert known.logprobs is not None
    generated = Generated(
        known.token_ids[:count],
        known.logprobs[:count],
        None if closed is None or closed > count else closed,
    )
    return replace(request, generated=generated)


def test_overlapping_steps_give_the_same_outputs(engines: tuple[Engine, Engine]) -> None:
    """Budgets with and without grace, formats, stop strings, minimum lengths, penalties, drawn and
    greedy, samples, shared beginnings, tokens that were there before; whatever comes when, and
    while others are taken out. Sequences end in every way, many times."""
    overlapping, plain = engines
    found: Counter[str] = Counter()
    for seed in range(4):
        rng = Random(seed)
        requests = mixed(plain, rng)
        expected = run(plain, requests)
        for at, request in enumerate(requests):
            output = expected[request.key, request.sample]
            found["closed by force"] += output.thinking_budget_hit
            found[output.finish_reason] += 1
            is_bound = request.params.response_format is not None
            found["format"] += is_bound and output.finish_reason is FinishReason.STOP
            if rng.random() < 0.3 and output.error is None:
                requests[at] = cut(request, output, rng)
        stay, gone = drive(overlapping, requests, seed, num_aborted=2)
        kept = {key for key, _ in stay}
        assert len(kept) == 12
        assert stay.keys() == {place for place in expected if place[0] in kept}
        for place, output in {**stay, **gone}.items():
            assert_same(output, expected[place])
    ways = ("closed by force", "format", FinishReason.STOP, FinishReason.LENGTH)
    assert min(found[way] for way in ways) > 5
    assert overlapping.stats().prefix_tokens > 300


class Watched:
    """What an engine asks its runner for, in order, and the rows that it launches."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = engine.runner
        launch, sample, collect = runner.launch, runner.sample, runner.collect
        self.phases: list[str] = []
        self.num_rows = 0
        self.num_in_flight = 0
        self.num_drawn = 0

        def launching(step: Step) -> list[Pass]:
            self.phases.append("launch")
            self.num_rows += len(step.decodes)
            self.num_in_flight += sum(not one.num_pending for one in step.decodes)
            return launch(step)

        def sampling(passes: list[Pass]) -> list[Drawn]:
            self.phases.append("sample")
            drawn = sample(passes)
            self.num_drawn += sum(len(one.sequences) for one in drawn)
            return drawn

        def collecting(drawn: list[Drawn]) -> list[NextToken]:
            self.phases.append("collect")
            return collect(drawn)

        monkeypatch.setattr(runner, "launch", launching)
        monkeypatch.setattr(runner, "sample", sampling)
        monkeypatch.setattr(runner, "collect", collecting)


def test_a_pass_is_launched_before_the_last_tokens_are_looked_at(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of things; decodes take their tokens from the device; a sequence that ends by
    count is run no further, so nothing runs for nothing."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    requests = [Request(key, (30 + key,) * 5, params) for key in range(3)]
    for overlap, expected in (
        (False, "launch sample collect " * 4),
        (True, "launch sample " + "launch collect sample " * 3 + "collect"),
    ):
        engine = make_engine(random_folder, overlap=overlap)
        watched = Watched(engine, monkeypatch)
        run(engine, requests)
        assert watched.phases == expected.split()
        assert watched.num_rows == 3 * 3
        assert watched.num_in_flight == (9 if overlap else 0)
        stats = engine.stats()
        assert stats.steps == 4 and stats.sampled_tokens == 12
        assert stats.step_seconds >= stats.last_step_seconds > 0


def test_an_end_that_is_not_foreseen_costs_a_row_and_no_token(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more decode for each sequence that stops early, which nothing is sampled from; its slot
    is the next one's at once."""
    engine = make_engine(random_folder, overlap=True, max_sequences=2)
    model = engine.runner.model

    def stopping(batch: object, state: object) -> Tensor:
        logits = model(batch, state)  # type: ignore[arg-type]
        logits[:, 12] = 1000.0
        return logits

    monkeypatch.setattr(engine.runner, "model", stopping)
    watched = Watched(engine, monkeypatch)
    params = SamplingParams(max_tokens=9)
    outputs = run(engine, [Request(key, (30 + key,) * 3, params) for key in range(6)])
    assert all(output.token_ids == (12,) for output in outputs.values())
    assert watched.num_rows == watched.num_drawn == engine.stats().sampled_tokens == 6
    # One pass for each pair's prompts and one for nothing; the next prompts are in the next.
    assert watched.phases.count("launch") == 6


@pytest.mark.parametrize("is_aborted", [False, True])
def test_the_time_between_two_runs_is_no_steps(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, is_aborted: bool
) -> None:
    """However a run ends, nothing is left in flight for which the clock goes on."""
    clock = [0.0]
    ticking = SimpleNamespace(monotonic=lambda: clock.append(clock[-1] + 1) or clock[-1])
    engine = make_engine(random_folder, overlap=True)
    monkeypatch.setattr("batchrun.engine.engine.time", ticking)
    stopping = SamplingParams(max_tokens=9, stop_token_ids=list(range(400)))
    for key in range(3):
        engine.add(Request(key, (30, 31), stopping))
        while engine.num_unfinished:
            engine.step()
            if is_aborted:
                engine.abort(key)
        clock.append(clock[-1] + 1e6)
    assert engine.stats().step_seconds < 100


@pytest.mark.parametrize("num_forced", [1, 3])
def test_forced_tokens_count_for_the_penalty_at_once(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, num_forced: int
) -> None:
    """One alone comes as a decode, as the token before it is in the state already; and what was
    drawn in vain in its place does not count."""
    token_ids = []
    for overlap in (False, True):
        engine = make_engine(random_folder, overlap=overlap, max_sequences=1)
        close = ForcedClose(lambda _: [64, 65, 66][:num_forced])
        monkeypatch.setattr(engine._admission, "_close", close)
        model = engine.runner.model

        def fixed(batch: object, state: object, model: Callable = model) -> Tensor:  # type: ignore[type-arg]
            logits = torch.zeros_like(model(batch, state))
            logits[:, 60], logits[:, 61], logits[:, 64], logits[:, 62] = 2.0, 1.9, 1.8, 1.7
            return logits

        monkeypatch.setattr(engine.runner, "model", fixed)
        output = run_one(
            engine, [5], thinking=True, max_tokens=4, max_thinking_tokens=1, temperature=0,
            repetition_penalty=2.0, answer_reserve=1, ignore_eos=True,
        )  # fmt: skip
        token_ids.append(output.token_ids)
    # 60 is halved once it is there, 64 though it was not sampled, 61 not before it is taken.
    assert token_ids[0] == token_ids[1] == (60, *[64, 65, 66][:num_forced], 61, 62, 60)


@pytest.mark.parametrize("phase", ["launch", "sample"])
def test_no_memory_with_a_step_in_flight(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Wherever it shows: what was sampled before is kept, the others begin again, fewer of them."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.7)
    requests = [Request(key, tuple(range(5, 9 + key)), params, seed=key) for key in range(8)]
    whole = run(make_engine(random_folder, max_sequences=8), requests)
    engine = make_engine(random_folder, max_sequences=8, overlap=True)
    launch, sample = engine.runner.launch, engine.runner._sampler.sample
    known: list[int] = []

    def fail() -> None:
        for pool in (engine.runner.state.ssm, engine.runner.state.conv):
            pool.fill_(torch.nan)
        known.append(sum(item.num_sampled for item in engine.running()))
        raise torch.OutOfMemoryError("no memory for 1 GiB")

    def launch_or_fail(step: Step) -> list[Pass]:
        if len(step.decodes) > 4 and engine.stats().steps > 1 and phase == "launch":
            fail()
        return launch(step)

    def sample_or_fail(logits: Tensor, slots: Tensor, positions: Tensor, needs: Needs) -> Sampling:
        if len(logits) > 4 and engine.stats().steps > 1 and phase == "sample":
            fail()
        return sample(logits, slots, positions, needs)

    monkeypatch.setattr(engine.runner, "launch", launch_or_fail)
    monkeypatch.setattr(engine.runner._sampler, "sample", sample_or_fail)
    for request in requests:
        engine.add(request)
    while not known:
        assert engine.step() == []
    reached = [engine.progress(request.key) for request in requests]
    in_flight = 8 if phase == "launch" else 0  # before a pass is sampled they are taken in
    assert sum(one.num_sampled for one in reached if one) == known[0] + in_flight > 8
    outputs = run(engine, [])
    assert len(known) == 1
    assert {key: output.token_ids for key, output in outputs.items()} == {
        key: output.token_ids for key, output in whole.items()
    }
    assert engine.stats().sampled_tokens == 8 * 12


def test_a_row_that_broke_is_not_run_on(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are not finite, seen a step later, end their row alone and once; its slot is
    sound for the next one."""
    engine = make_engine(random_folder, overlap=True, max_sequences=3)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    requests = [Request(i, (i + 5,), params) for i in range(6)]
    expected = run(engine, requests)
    model, num_broken = engine.runner.model, 0

    def broken(batch: object, state: object) -> Tensor:
        nonlocal num_broken
        logits = model(batch, state)  # type: ignore[arg-type]
        if len(logits) == 3 and num_broken < 1:
            logits[1], num_broken = torch.nan, num_broken + 1
        return logits

    monkeypatch.setattr(engine.runner, "model", broken)
    outputs = run(engine, requests)
    failed = [place for place, output in outputs.items() if output.error is not None]
    assert len(failed) == 1 and len(outputs) == 6
    for place in outputs.keys() - set(failed):
        assert outputs[place].token_ids == expected[place].token_ids


def test_aborting_while_a_step_is_in_flight(random_folder: Path) -> None:
    """What is in flight belongs to nobody then: no output, no token counted; and the next sequence
    in the slot, of the same key too, has nothing of it."""
    engine = make_engine(random_folder, overlap=True, max_sequences=2)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, second = (Request("key", (30, 31), params, seed=seed) for seed in (1, 2))
    expected = run(make_engine(random_folder), [second])
    engine.add(first)
    for _ in range(3):
        assert engine.step() == []
    assert engine.progress("key").num_sampled == 2  # type: ignore[union-attr]
    assert engine.abort("key") == 2 and engine.num_unfinished == 0
    engine.check_integrity()
    outputs = run(engine, [second])
    assert outputs["key", 0].token_ids == expected["key", 0].token_ids
    assert engine.stats().sampled_tokens == 2 + 8


def test_recorded_steps_read_their_tokens_by_slot(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed steps too: the host hands over no token that is in flight."""

    params = SamplingParams(max_tokens=9, ignore_eos=True)
    requests = [Request(key, (30 + key,) * 5, params, seed=key) for key in range(5)]
    expected = run(make_engine(random_folder, max_sequences=3), requests)
    engine = make_engine(random_folder, max_sequences=3, overlap=True)
    engine.runner.record(CallingRecorder())
    graphs = engine.runner._graphs
    assert graphs is not None
    replay, given = graphs.run, []
    monkeypatch.setattr(graphs, "run", lambda ids, *more: given.extend(ids) or replay(ids, *more))
    outputs = run(engine, requests)
    assert set(given) == {IN_FLIGHT} and len(given) > 20
    for place, output in outputs.items():
        assert output.token_ids == expected[place].token_ids


class Shapes(PlainOps):
    """Operators for tensors without contents: results have their shapes, states are left alone."""

    rectangles = False

    def causal_conv(self, x: Tensor, *_: object) -> Tensor:
        return torch.empty_like(x)

    def ssd_scan(self, x: Tensor, *_: object) -> Tensor:
        return torch.empty_like(x)

    def attention(self, q: Tensor, *_: object) -> Tensor:
        return torch.empty_like(q)


class NoWaiting(TorchFunctionMode):
    """Refuses what makes the host wait for a device: copies from ordinary memory to it, also where
    torch makes them of lists. That a number of it is looked at, or a shape depends on one, a device
    without contents refuses by itself."""

    num_copies = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        waits = name == "tensor" and kwargs.get("device") == torch.device("meta")
        if name in ("__getitem__", "__setitem__") and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits = any(isinstance(part, list) for part in index)
        if name in ("to", "copy_", "__setitem__"):
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            source, target = tensors[-1], func(*args, **kwargs) if name == "to" else tensors[0]
            if source.device.type == "cpu" and target.is_meta:
                self.num_copies += 1
                waits = not kwargs.get("non_blocking")
        assert not waits, f"{name}{args}"
        return func(*args, **kwargs)


def test_launching_and_sampling_wait_for_nothing(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, chunks, forced tokens, snapshots, recorded steps, and all that is sampled by, on a
    device whose tensors have no contents: no number of it is read, and every copy to it is one that
    need not be waited for. So the device can be given work while it has some."""
    engine = make_engine(random_folder, overlap=True, max_sequences=5, max_batch_tokens=64)
    meta, cpu = torch.device("meta"), engine.runner
    with meta:
        model = NemotronH(engine.config, Shapes())
    runner = ModelRunner(
        model,
        engine.memory,
        dtype=torch.float32,
        state_dtype=torch.float32,
        device=meta,
        constraints=cpu.constraints,
    )
    # What would be pinned memory is ordinary memory here.
    words = engine.config.vocab_size // 32 + 1
    room = lambda rows, _: torch.empty(rows, words, dtype=torch.int32)  # noqa: E731
    monkeypatch.setattr(runner.constraints, "_room", room)
    kinds: Counter[str] = Counter()

    def collect(drawn: list[Drawn]) -> list[NextToken]:
        tokens = []
        for one in drawn:
            assert one.sampling.ids.device == meta
            for sequence in one.sequences:
                params = sequence.request.params
                kinds["drawn"] += not params.greedy
                kinds["bound"] += params.bound_to is not None
                kinds["banned"] += sequence.transcript.num_sampled < params.min_tokens
                kinds["forced"] += sequence.transcript.budget_hit
                tokens.append(NextToken(sequence, rng.randrange(400), -1.0, True))
        return tokens

    monkeypatch.setattr(runner, "collect", collect)
    engine.runner = runner
    rng = Random(0)
    with NoWaiting() as waiting:
        run(engine, mixed(engine, Random(0))[:12])
        runner.record(CallingRecorder())
        run(engine, mixed(engine, Random(1))[:12])
    assert waiting.num_copies > 400
    assert min(kinds[kind] for kind in ("drawn", "bound", "banned", "forced")) > 3
    assert engine.stats().prefix_tokens > 100
