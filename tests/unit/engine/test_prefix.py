"""States of shared beginnings: whoever starts from one gives what it would have given alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine import memory
from batchrun.engine.blocks import Pool
from batchrun.engine.forecast import Forecast
from batchrun.engine.params import SamplingParams
from batchrun.engine.prefix import GRAIN, PrefixStates
from batchrun.engine.request import Output, Request
from batchrun.engine.scheduler import Scheduler, Step
from batchrun.engine.sequence import Sequence
from batchrun.engine.transcript import Transcript
from batchrun.records import ErrorKind
from tests.unit.engine.support import make_engine, run, write_random

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0)


def same(one: Output, other: Output) -> bool:
    """Equal but for times and what came from snapshots; log-probabilities within rounding."""
    pairs = zip(one.logprobs or (), other.logprobs or (), strict=True)
    close = all(a is b is None or abs((a or 0) - (b or 0)) < 1e-4 for a, b in pairs)
    bare = {"timings": one.timings, "logprobs": None, "prefix_tokens": 0}
    return close and replace(one, **bare) == replace(other, **bare)  # type: ignore[arg-type]


def family(seed: int, count: int) -> list[Request]:
    """Prompts with beginnings of beginnings in common, repeated ones, and samples of one row."""
    rng = Random(seed)

    def text(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(20, 400) for _ in range(length))

    roots = [text(rng.randint(60, 150)) for _ in range(2)]
    branches = [root + text(rng.randint(60, 90)) for root in roots for _ in range(2)]
    made: list[Request] = []
    for key in range(count):
        begin = rng.choice([*roots, *branches, *branches, ()])
        prompt = begin + text(rng.choice([1, 2, 15, 16, 17, rng.randint(1, 60)]))
        params = replace(
            GREEDY,
            max_tokens=rng.randint(1, 12),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            max_thinking_tokens=rng.choice([None, 0, 3]),
        )
        thinking = rng.random() < 0.5
        for sample in range(rng.choice([1, 1, 1, 4])):
            made.append(Request(key, prompt, params, seed=key, sample=sample, thinking=thinking))
    return made


@pytest.mark.parametrize("seed", range(6))
def test_answers_are_those_without_snapshots(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Tokens, texts, counts and log-probabilities, over nested beginnings, arrival orders, chunk
    budgets, few and many snapshots, and pools that were full of NaN."""
    rng = Random(seed)
    requests = family(seed, 24)
    plain = make_engine(random_folder, max_sequences=12, prefix_states=False)
    expected = run(plain, requests)
    monkeypatch.setattr(memory, "_SEQUENCES_PER_SNAPSHOT", rng.choice([1, 2, 16]))
    engine = make_engine(
        random_folder,
        max_sequences=rng.choice([1, 3, 12]),
        max_batch_tokens=rng.choice([16, 48, 512]),
    )
    got = run(engine, rng.sample(requests, len(requests)))
    assert all(same(got[key], output) for key, output in expected.items())
    assert engine.stats().prefix_tokens > 100
    assert engine.stats().prefix_tokens == sum(o.prefix_tokens for o in got.values())
    total = sum(len(r.prompt_token_ids) for r in requests)
    assert engine.stats().prompt_tokens + engine.stats().prefix_tokens == total
    assert plain.stats().prefix_tokens == 0


@pytest.mark.parametrize("pattern", ["MM-", "*-*"])
def test_models_of_one_kind_of_layer(tmp_path: Path, pattern: str) -> None:
    """A snapshot without blocks, and one without Mamba-2 states."""
    folder = write_random(tmp_path, hybrid_override_pattern=pattern)
    requests = family(3, 16)
    expected = run(make_engine(folder, prefix_states=False), requests)
    engine = make_engine(folder, max_sequences=4, max_batch_tokens=64)
    got = run(engine, requests)
    assert all(same(got[key], output) for key, output in expected.items())
    assert engine.stats().prefix_tokens > 100


def test_a_beginning_is_computed_once(random_folder: Path) -> None:
    """Of many prompts with one beginning, one computes it; the others only their own tokens."""
    engine = make_engine(random_folder, max_sequences=8)
    beginning = tuple(range(20, 20 + 8 * GRAIN))
    outputs = run(engine, [Request(i, (*beginning, 200 + i, 7), GREEDY) for i in range(20)])
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.prefix_tokens) == (8 * GRAIN + 20 * 2, 19 * 8 * GRAIN)
    assert sorted(o.prefix_tokens for o in outputs.values()) == [0] + [8 * GRAIN] * 19
    # Later ones too, when all the others have long gone.
    run(engine, [Request("late", (*beginning, 9), GREEDY)])
    assert engine.stats().prompt_tokens == stats.prompt_tokens + 1


def test_samples_of_a_row_have_one_prefill(random_folder: Path) -> None:
    """Whatever the length of the prompt: all but its last token is computed once."""
    engine = make_engine(random_folder, max_sequences=8)
    prompt = tuple(range(30, 67))
    drawn = replace(GREEDY, temperature=1.0)
    outputs = run(engine, [Request("row", prompt, drawn, sample=n) for n in range(6)])
    assert engine.stats().prompt_tokens == len(prompt) + 5
    assert len({o.token_ids for o in outputs.values()}) == 6
    plain = make_engine(random_folder, prefix_states=False)
    expected = run(plain, [Request("row", prompt, drawn, sample=n) for n in range(6)])
    assert all(same(outputs[key], output) for key, output in expected.items())


@pytest.mark.parametrize("spare", [0, 1])
def test_a_prompt_keeps_a_token_to_compute(random_folder: Path, spare: int) -> None:
    """Nothing is sampled from a snapshot: a prompt that ends where one does computes its last
    token, and one a token longer that token."""
    engine = make_engine(random_folder, max_sequences=4)
    long = tuple(range(20, 20 + 5 * GRAIN + 9))
    prompt = long[: 4 * GRAIN + spare]
    expected = run(make_engine(random_folder, prefix_states=False), [Request("p", prompt, GREEDY)])
    run(engine, [Request(n, (*long[: 4 * GRAIN], n), GREEDY) for n in range(3)])
    output = run(engine, [Request("p", prompt, GREEDY)])["p", 0]
    assert same(output, expected["p", 0])
    assert output.prefix_tokens == (4 * GRAIN if spare else 0)


def test_an_abort_while_a_snapshot_is_made_hurts_nobody(random_folder: Path) -> None:
    """Those that waited for it make one of their own."""
    beginning = tuple(range(20, 180))
    requests = [Request(i, (*beginning, 200 + i), GREEDY) for i in range(6)]
    expected = run(make_engine(random_folder, prefix_states=False), requests)
    engine = make_engine(random_folder, max_sequences=4, max_batch_tokens=32)
    for request in requests:
        engine.add(request)
    engine.step()
    assert engine.num_running == 1  # the others wait for what it computes
    engine.abort(0)
    engine.check_integrity()
    outputs = {}
    while engine.num_unfinished:
        outputs.update({(o.key, 0): o for o in engine.step()})
        engine.check_integrity()
    assert sorted(key for key, _ in outputs) == [1, 2, 3, 4, 5]
    assert all(same(output, expected[key]) for key, output in outputs.items())
    assert engine.stats().prefix_tokens == 4 * 160


def test_a_broken_state_is_not_handed_on(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After logits that are no numbers, nothing starts from a snapshot that was there before."""
    engine = make_engine(random_folder, max_sequences=2)
    beginning = tuple(range(20, 120))
    requests = [Request(i, (*beginning, 200 + i), GREEDY) for i in range(8)]
    expected = run(make_engine(random_folder, prefix_states=False), requests)
    model, calls = engine.runner.model, 0

    def broken(batch: object, state: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = model(batch, state)
        if calls == 1:
            for pool in (engine.runner.state.ssm, engine.runner.state.keys):
                pool.fill_(torch.nan)
        return logits

    monkeypatch.setattr(engine.runner, "model", broken)
    outputs = run(engine, requests)
    failed = [o for o in outputs.values() if o.error is not None]
    assert 1 <= len(failed) <= 2  # those that ran meanwhile
    assert all(o.error is not None and o.error.kind is ErrorKind.ENGINE for o in failed)
    good = {key: o for key, o in outputs.items() if o.error is None}
    assert all(same(output, expected[key]) for key, output in good.items())


def test_deterministic_engines_keep_none(random_folder: Path) -> None:
    """Where a prompt is cut must not depend on what else was seen."""
    engine = make_engine(random_folder, deterministic=True)
    assert engine.memory.num_snapshots == 0
    run(engine, [Request(i, (*range(20, 220), i), GREEDY) for i in range(3)])
    assert engine.stats().prefix_tokens == 0


class Simulated:
    """A scheduler with snapshots over pools that hold token ids instead of a model's state."""

    def __init__(self, slots: int, snapshots: int, budget: int) -> None:
        self.slots: dict[int, tuple[int, ...]] = {}
        self.blocks: dict[int, tuple[int, ...]] = {}
        self.saved = 0
        self.prefixes = PrefixStates(
            Pool("snapshot slot", slots + snapshots + 1, slots + 1),
            Pool("snapshot block", 1000 + snapshots * 8, 1000),
            block_size=32,
            uses_blocks=True,
        )
        self.scheduler = Scheduler(
            Pool("slot", slots + 1),
            Pool("block", 1000),
            block_size=32,
            uses_blocks=True,
            max_batch_tokens=budget,
            forecast=Forecast(budget),
            patience=3 * slots,
            prefixes=self.prefixes,
        )

    def add(self, prompt: tuple[int, ...], max_tokens: int) -> Sequence:
        """One more request."""
        transcript = Transcript(
            [b""] * 9, None, stop_ids=frozenset(), stops=(), max_tokens=max_tokens, min_tokens=0
        )
        request = Request(object(), prompt, SamplingParams(max_tokens=max_tokens))
        reserved = len(prompt) + max_tokens
        sequence = Sequence(request, transcript, num_reserved=reserved, added_at=0.0)
        self.scheduler.add(sequence)
        return sequence

    def hold(self, slot: int, blocks: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        """The pools after a forward pass or a copy."""
        self.slots[slot] = tokens
        for at, block in enumerate(blocks):
            self.blocks[block] = tokens[32 * at : 32 * at + 32]

    def held(self, slot: int, blocks: tuple[int, ...], count: int) -> tuple[int, ...]:
        """What slot and blocks hold, which has to be one and the same."""
        paged = tuple(t for block in blocks for t in self.blocks.get(block, ()))
        tokens = self.slots[slot]
        assert len(tokens) == count and paged[:count] == tokens
        return tokens

    def run(self, step: Step) -> None:
        """What the model runner does, in its order."""
        for sequence in step.admitted:
            source = sequence.source
            if source is not None:
                assert source.is_ready and sequence.slot is not None
                tokens = self.held(source.slot, source.blocks, source.num_tokens)
                self.hold(sequence.slot, sequence.blocks[: len(source.blocks)], tokens)
                self.saved += len(tokens)
        chunks = [(s, 1) for s in step.decodes] + [
            (c.sequence, c.num_tokens) for c in step.prefills
        ]
        for sequence, count in chunks:
            assert sequence.slot is not None
            before = sequence.num_context
            if before:
                held = -(-before // 32)
                tokens = self.held(sequence.slot, sequence.blocks[:held], before)
                assert tokens == tuple(sequence.tokens[:before])
            sequence.num_context += count
            now = tuple(sequence.tokens[: sequence.num_context])
            self.hold(sequence.slot, sequence.blocks[: -(-len(now) // 32)], now)
            snapshot = sequence.snapshot
            if snapshot is not None and sequence.num_context == snapshot.num_tokens:
                self.hold(snapshot.slot, snapshot.blocks, now)
                snapshot.is_ready, sequence.snapshot = True, None
            if not sequence.num_pending:
                sequence.append(5, None)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_state_is_always_that_of_the_sequences_own_tokens(data: st.DataObject) -> None:
    """Over any arrivals, budgets, evictions and aborts, slot and blocks together hold exactly the
    tokens that the sequence believes; everybody ends; nothing is lost."""
    draw = data.draw
    rng = Random(draw(st.integers(0, 2**32)))
    simulated = Simulated(
        draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 90))
    )
    begins = [tuple(rng.choices(range(3), k=rng.randint(10, 120))) for _ in range(4)]
    begins += [begin + tuple(rng.choices(range(3), k=70)) for begin in begins]
    left: set[Sequence] = set()
    to_come = draw(st.integers(2, 25))
    for _ in range(4000):
        if to_come and rng.random() < 0.5:
            to_come -= 1
            prompt = rng.choice(begins) + tuple(rng.choices(range(3), k=rng.randint(1, 20)))
            for _ in range(rng.choice([1, 1, 3])):
                left.add(simulated.add(prompt, rng.randint(1, 9)))
        if left and rng.random() < 0.04:
            gone = rng.choice(sorted(left, key=lambda s: s.arrival))
            simulated.scheduler.abort({gone})
            left.remove(gone)
        simulated.run(simulated.scheduler.schedule())
        ended = {s for s in left if s.transcript.finish_reason is not None}
        simulated.scheduler.finish(ended)
        left -= ended
        simulated.scheduler.check_integrity()
        if not left and not to_come:
            break
    assert not left and not to_come
    assert simulated.scheduler.num_waiting == simulated.scheduler.num_waiting_tokens == 0


def work_off(simulated: Simulated, prompts: list[tuple[int, ...]]) -> int:
    """Run prompts to their ends; how many tokens of them were not computed."""
    before = simulated.saved
    for prompt in prompts:
        simulated.add(prompt, 2)
    while step := simulated.scheduler.schedule():
        simulated.run(step)
        running = {c.sequence for c in step.prefills} | set(step.decodes)
        ended = {s for s in running if s.transcript.finish_reason is not None}
        simulated.scheduler.finish(ended)
    return simulated.saved - before


def test_what_is_used_stays_and_what_is_not_goes() -> None:
    """One place for a state: that of the many stays when two meet, and goes in the end when
    nobody comes for it any more."""
    simulated = Simulated(4, 1, 1000)

    def ask(kind: int, count: int) -> int:
        return work_off(simulated, [(*(kind,) * 80, 10 + n, 4) for n in range(count)])

    assert ask(1, 10) == 9 * 80
    assert ask(2, 2) == 0
    assert ask(1, 1) == 80
    for _ in range(30):
        ask(3, 3)
    assert ask(3, 3) == 3 * 80
    assert ask(1, 1) == 0


@pytest.mark.parametrize("length", [80, 81, 90])
def test_each_row_of_many_samples_has_its_turn(length: int) -> None:
    """The state of a row whose samples have all begun makes room for the next row's."""
    simulated = Simulated(4, 1, 1000)
    for kind in range(12):
        assert work_off(simulated, [(kind,) * length] * 4) == 3 * (length - 1)


def test_what_comes_round_too_late_drives_nobody_out() -> None:
    """More beginnings than places, each of them seen again and again: some are kept and used."""
    simulated = Simulated(2, 2, 1000)
    prompts = [(*(kind,) * 80, 99) for kind in range(10)]
    rounds = [work_off(simulated, [(*p, turn) for p in prompts]) for turn in range(5)]
    assert rounds[0] == rounds[1] == 0
    assert rounds[2:] == [2 * 80] * 3


def test_a_hash_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beginnings that differ and have one hash never share a state."""
    monkeypatch.setattr("batchrun.engine.prefix.hash", lambda _: 1, raising=False)
    simulated = Simulated(4, 2, 1000)
    for kind in (1, 2, 1, 2, 1, 2):
        simulated.add((*(kind,) * 64, 9), 2)
    for _ in range(20):
        simulated.run(simulated.scheduler.schedule())
