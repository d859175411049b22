"""The engine: every request answered as if it were alone, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from batchrun.engine.engine import Engine
from batchrun.engine.model_runner import Pass
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request
from batchrun.engine.scheduler import Step
from batchrun.errors import CheckpointError
from batchrun.records import ErrorKind, FinishReason
from tests.unit.engine.support import TINY, make_engine, run, run_one, write_random


@pytest.fixture(scope="module")
def engine(random_folder: Path) -> Engine:
    """Few slots and a small budget of tokens, so that sequences wait, join and leave."""
    return make_engine(random_folder, max_sequences=4, max_batch_tokens=48)


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 150 tokens, greedy and drawn, thinking and not, of all parameters."""
    rng = Random(seed)
    made = []
    for i in range(count):
        max_tokens = rng.randint(1, 40)
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 20]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            logprobs=0,
            ignore_eos=rng.random() < 0.5,
            max_thinking_tokens=rng.choice([None, 0, 3, 10]),
            thinking_grace=rng.choice([0, 4]),
        )
        length = rng.choice([1, 2, 3, 15, 16, 17, rng.randint(1, 150)])
        prompt = tuple(rng.randrange(400) for _ in range(length))
        made.append(Request(i, prompt, params, seed=i, thinking=rng.random() < 0.5))
    return made


def same(one: Output, other: Output) -> bool:
    """Equal but for times and what came from snapshots, log-probabilities within rounding."""
    pairs = zip(one.logprobs or (), other.logprobs or (), strict=True)
    close = all(a is b is None or abs((a or 0) - (b or 0)) < 1e-4 for a, b in pairs)
    bare = {"timings": one.timings, "logprobs": None, "prefix_tokens": 0}
    return close and replace(one, **bare) == replace(other, **bare)  # type: ignore[arg-type]


def test_a_row_in_any_batch_is_the_row_alone(engine: Engine, random_folder: Path) -> None:
    """Whatever neighbours, slots, chunks and order: same tokens, texts, counts and logprobs."""
    requests = mixed_requests(40)
    together = run(engine, requests)
    shuffled = run(
        make_engine(random_folder, max_sequences=16, max_batch_tokens=2048),
        Random(1).sample(requests, len(requests)),
    )
    alone = make_engine(random_folder, max_sequences=1)
    for request in requests:
        single = run(alone, [request])[request.key, 0]
        assert same(single, together[request.key, 0])
        assert same(single, shuffled[request.key, 0])


def test_deterministic_is_equal_to_the_byte(random_folder: Path) -> None:
    """Log-probabilities too, with other neighbours, other slots and another number of them."""
    requests = mixed_requests(16, seed=3)
    few = make_engine(random_folder, deterministic=True, max_sequences=2, max_batch_tokens=32)
    many = make_engine(random_folder, deterministic=True, max_sequences=9, max_batch_tokens=32)
    one, other = run(few, requests), run(many, requests[::-1])
    for key, output in one.items():
        assert output.token_ids == other[key].token_ids
        assert output.logprobs == other[key].logprobs


def test_forced_tokens_are_as_if_they_stood_in_the_prompt(engine: Engine) -> None:
    """Fed as one chunk onto the state; the answer is that of the whole text as a prompt."""
    prompt = list(range(100, 140))
    output = run_one(
        engine, prompt, thinking=True, max_tokens=40, temperature=0, max_thinking_tokens=6,
        ignore_eos=True, logprobs=0,
    )  # fmt: skip
    assert output.thinking_budget_hit
    assert output.logprobs is not None
    forced = [i for i, p in enumerate(output.logprobs) if p is None]
    assert forced == list(range(6, 6 + len(forced)))
    assert (output.num_reasoning_tokens, output.num_completion_tokens) == (6, 34)
    head = output.token_ids[: forced[-1] + 1]
    again = run_one(
        engine, [*prompt, *head], max_tokens=34, temperature=0, ignore_eos=True, logprobs=0
    )
    assert again.token_ids == output.token_ids[len(head) :]


def test_the_text_is_that_of_the_tokens(engine: Engine) -> None:
    """Special tokens and the stopping one add nothing; all else is in the text."""
    assert engine.tokenizer is not None
    special = set(engine.tokenizer.special_tokens.values())
    for output in run(engine, mixed_requests(20, seed=7)).values():
        if output.reasoning is None and not output.thinking_budget_hit:
            ids = [i for i in output.token_ids if i not in special]
            assert output.text == engine.tokenizer.decode(ids)


@pytest.mark.parametrize("place", [1, -1])
@pytest.mark.parametrize("max_batch_tokens", [1, 6, 48])
def test_forced_tokens_count_for_the_repetition_penalty(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch, max_batch_tokens: int, place: int
) -> None:
    """They are output like any other, in however many steps they are run."""
    engine = make_engine(random_folder, max_sequences=1, max_batch_tokens=max_batch_tokens)
    assert engine.tokenizer is not None
    forced = engine.tokenizer.encode_plain("\n</think>\n\n")[place]
    model = engine.runner.model

    def fixed(batch: object, state: object) -> torch.Tensor:
        logits = torch.zeros_like(model(batch, state))
        logits[:, 60], logits[:, 61] = 2.0, 1.8
        logits[:, forced] = 1.9 if engine.stats().sampled_tokens > before else 0.0
        return logits

    monkeypatch.setattr(engine.runner, "model", fixed)
    before = engine.stats().sampled_tokens
    output = run_one(
        engine, [5], thinking=True, max_tokens=2, max_thinking_tokens=1, temperature=0,
        repetition_penalty=2.0, answer_reserve=1,
    )  # fmt: skip
    assert output.token_ids[0] == 60 and output.token_ids[-1] == 61


def test_forced_tokens_have_their_own_room(engine: Engine) -> None:
    """Sequences whose prompt and max_tokens fill their blocks exactly do not get into each
    other's way."""
    params = SamplingParams(max_tokens=12, temperature=0, max_thinking_tokens=8, ignore_eos=True)
    prompts = [tuple(range(n, n + 20)) for n in (20, 60, 100, 140)]
    outputs = run(engine, [Request(p, p, params, thinking=True) for p in prompts])
    for prompt in prompts:
        output = outputs[prompt, 0]
        assert output.thinking_budget_hit
        (again,) = run(
            engine,
            [Request("again", prompt + output.token_ids[:-4], replace(params, max_tokens=4))],
        ).values()
        assert again.token_ids == output.token_ids[-4:]


def test_the_answer_reserve_forces_the_close(engine: Engine) -> None:
    """A quarter of max_tokens is left for the answer, or as much as asked for."""
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    for reserve, spent in ((None, 15), (7, 13), (0, 20)):
        asked = replace(params, answer_reserve=reserve)
        output = run(engine, [Request("r", (60, 61), asked, thinking=True)])["r", 0]
        assert output.num_reasoning_tokens == spent
        assert output.thinking_budget_hit == (reserve != 0)
        assert output.num_completion_tokens == 20 - spent


@pytest.mark.parametrize("stop_id", [2, 11, 12])
def test_each_of_the_three_stop_tokens_stops(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stop_id: int
) -> None:
    """generation_config.json names three; the stopping token is counted, and no text."""
    favour(engine, monkeypatch, lambda step: 50 if step < 3 else stop_id)
    output = run_one(engine, [1, 60], max_tokens=9, temperature=0)
    assert output.token_ids == (50, 50, 50, stop_id)
    assert output.finish_reason is FinishReason.STOP
    assert engine.tokenizer is not None
    assert output.text == engine.tokenizer.decode([50, 50, 50])
    assert output.num_completion_tokens == 4


def test_ignore_eos_stop_token_ids_and_min_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ignore_eos passes the model's own stop tokens, not those of the request; before min_tokens
    no stop token is taken."""
    favour(engine, monkeypatch, lambda step: 12)
    assert run_one(engine, [1], max_tokens=5, ignore_eos=True).token_ids == (12,) * 5
    stopped = run_one(engine, [1], max_tokens=5, ignore_eos=True, stop_token_ids=[12])
    assert stopped.token_ids == (12,)
    later = run_one(engine, [1], max_tokens=5, min_tokens=3, temperature=0)
    assert len(later.token_ids) == 4
    assert later.token_ids[3] == 12 and 12 not in later.token_ids[:3]
    outside = run_one(engine, [1], max_tokens=5, min_tokens=3, stop_token_ids=[12, 10**6])
    assert 12 not in outside.token_ids[:3]
    beside = [
        Request(n, (1,), SamplingParams(max_tokens=5, min_tokens=n, temperature=0))
        for n in range(4)
    ]
    lengths = [len(run(engine, beside)[n, 0].token_ids) for n in range(4)]
    assert lengths == [1, 2, 3, 4]


def test_a_stop_string_ends_the_text_before_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the border of tokens; the finish reason is stop, and the tokens stay."""
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode_plain("one two\nthree")
    favour(engine, monkeypatch, lambda step: ids[step])
    output = run_one(engine, [1], max_tokens=len(ids), temperature=0, stop=["o\nt", "zzz"])
    assert (output.text, output.finish_reason) == ("one tw", FinishReason.STOP)
    assert output.token_ids == tuple(ids[: len(output.token_ids)])


def test_samples_of_a_prompt_differ_and_repeat(engine: Engine) -> None:
    """Each sample has its own random numbers, a seed gives them again, another seed others."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    def sample(seed: int) -> list[tuple[int, ...]]:
        requests = [Request("k", (5, 6), params, seed=seed, sample=n) for n in range(4)]
        return [run(engine, requests)["k", n].token_ids for n in range(4)]

    first = sample(1)
    assert len(set(first)) == 4
    assert sample(1) == first
    assert not set(sample(2)) & set(first)


def test_what_can_never_run_is_told_at_admission(engine: Engine) -> None:
    """Too long, empty or outside the vocabulary: an error output, and the neighbours run."""
    fits = SamplingParams(max_tokens=12)
    outputs = run(
        engine,
        [
            Request("long", (5,) * 501, fits),
            Request("empty", (), fits),
            Request("outside", (5, 400), fits),
            Request("whole", (5,) * 500, fits),
        ],
    )
    error = outputs["long", 0].error
    assert error is not None and error.kind is ErrorKind.TOO_LONG
    assert error.message == "501 prompt tokens + max_tokens 12 = 513 > max_model_len 512"
    assert error == engine.admission_error(501, fits)
    assert outputs["long", 0].finish_reason is FinishReason.ERROR
    for key in ("empty", "outside"):
        refused = outputs[key, 0].error
        assert refused is not None and refused.kind is ErrorKind.INVALID_PROMPT
    assert outputs["whole", 0].error is None
    assert engine.admission_error(500, fits) is None


def test_max_tokens_none_goes_to_the_models_length(engine: Engine) -> None:
    """As in vLLM; a prompt that leaves nothing is too long."""
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    output = run(engine, [Request("a", (5,) * 490, params)])["a", 0]
    assert (output.num_completion_tokens, output.finish_reason) == (22, FinishReason.LENGTH)
    assert engine.admission_error(512, params) is not None


def test_an_aborted_key_gives_no_output(engine: Engine) -> None:
    """All its samples go, waiting or running; the others finish as if it had never been."""
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    expected = run(engine, [Request("stays", (7, 8, 9), params)])["stays", 0]
    for sample in range(6):
        engine.add(Request("goes", (1, 2, 3), params, sample=sample))
    engine.add(Request("stays", (7, 8, 9), params))
    outputs = [o for _ in range(3) for o in engine.step()]
    progress = engine.progress("goes")
    assert progress is not None
    assert (progress.num_sampled, progress.max_tokens) == (12, 120)
    assert engine.abort("goes") == 12
    assert engine.abort("goes") == 0 and engine.progress("goes") is None
    while engine.num_unfinished:
        outputs += engine.step()
    engine.check_integrity()
    assert [o.key for o in outputs] == ["stays"]
    assert same(replace(outputs[0], logprobs=()), replace(expected, logprobs=()))


def test_the_same_request_twice_is_a_mistake(engine: Engine) -> None:
    """Its outputs could not be told apart."""
    engine.add(Request("twice", (5,), SamplingParams()))
    with pytest.raises(ValueError, match="'twice', sample 0 is there already"):
        engine.add(Request("twice", (5,), SamplingParams()))
    engine.abort("twice")


def test_logits_that_are_not_numbers_are_an_error_of_their_row(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only that row fails, its slot is free, and the next one there is sound."""
    requests = [Request(i, (i + 5,), SamplingParams(max_tokens=6, temperature=0)) for i in range(3)]
    expected = run(engine, requests)
    model = engine.runner.model

    def broken(batch: object, state: object) -> torch.Tensor:
        logits = model(batch, state)
        if len(logits) == 3:
            logits[1] = torch.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "model", broken)
        outputs = run(engine, requests)
    error = outputs[1, 0].error
    assert error is not None and error.kind is ErrorKind.ENGINE
    assert outputs[0, 0].token_ids == expected[0, 0].token_ids
    assert run(engine, requests)[1, 0].token_ids == expected[1, 0].token_ids


def test_stats_count_what_was_done(random_folder: Path) -> None:
    """Tokens of prompts, sampled and forced ones; slots and blocks while running."""
    engine = make_engine(random_folder, max_sequences=3)
    params = SamplingParams(max_tokens=8, ignore_eos=True, max_thinking_tokens=2)
    for key in range(4):
        engine.add(Request(key, (9,) * 10, params, thinking=True))
    assert engine.num_waiting == 4
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.slots_used, stats.slots_total) == (
        3,
        1,
        3,
        3,
    )
    assert stats.blocks_used == 3  # 10 + 8 + forced tokens: one block of 32 each
    while engine.num_unfinished:
        engine.step()
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.sampled_tokens) == (40, 32)
    assert stats.forced_tokens >= 4 * 3
    assert stats.steps == 2 * 8 and stats.step_seconds >= stats.last_step_seconds > 0


@pytest.mark.parametrize("pattern", ["MM-", "*-*"])
def test_models_of_one_kind_of_layer_run(tmp_path: Path, pattern: str) -> None:
    """Without attention there are no blocks, without Mamba-2 no state."""
    folder = write_random(tmp_path, hybrid_override_pattern=pattern)
    few, alone = make_engine(folder, max_sequences=3), make_engine(folder, max_sequences=1)
    requests = mixed_requests(6)
    together = run(few, requests)
    for request in requests:
        assert same(run(alone, [request])[request.key, 0], together[request.key, 0])


def test_a_checkpoint_without_a_tokenizer_runs_on_ids(tmp_path: Path) -> None:
    """The texts are empty; the tokens are the same as with one."""
    bare = make_engine(write_random(tmp_path / "bare", tokenizer=False))
    full = make_engine(write_random(tmp_path / "full"))
    assert bare.tokenizer is None and bare.chat is None
    one, other = (run_one(e, [1, 50], max_tokens=9, seed=4) for e in (bare, full))
    assert one.token_ids == other.token_ids
    assert (one.text, one.reasoning) == ("", None)


def test_bfloat16_runs(random_folder: Path) -> None:
    """The type of the large model, on the CPU."""
    engine = make_engine(random_folder, dtype="bfloat16", state_dtype="bfloat16")
    assert engine.runner.state.keys.dtype is engine.runner.state.ssm.dtype is torch.bfloat16
    assert run_one(engine, [1, 50], max_tokens=9, ignore_eos=True).num_completion_tokens == 9


def test_int8_is_the_same_for_any_batch(random_folder: Path) -> None:
    """Quantised weights: a sequence alone gives the tokens that it gives among others, and the
    memory plan counts the bytes that the weights take."""
    engine = make_engine(random_folder, quantization="int8")
    held = sum(parameter.nbytes for parameter in engine.runner.model.parameters())
    assert engine.memory.weight_bytes == held
    requests = mixed_requests(12)
    together = run(engine, requests)
    assert len(together) == 12
    for request in requests:
        assert same(run(engine, [request])[request.key, 0], together[request.key, 0])


@pytest.mark.parametrize("pattern", ["M*-M*-", "MM-", "*-*-"])
@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 float32", "bfloat16 bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_engine_allocates_what_was_planned(
    pattern: str, dtypes: str, quantization: str, tmp_path: Path
) -> None:
    """Every row of the memory table that is allocated at load has the size of its tensors, to the
    byte; together they fit into the memory that was given."""
    folder = write_random(tmp_path / "model", hybrid_override_pattern=pattern)
    dtype, state_dtype = dtypes.split()
    engine = make_engine(
        folder,
        dtype=dtype,
        state_dtype=state_dtype,
        quantization=quantization,
        memory_bytes=200 << 20,
        max_model_len=300,
    )
    plan, state = engine.memory, engine.runner.state
    held = {
        "weights": sum(parameter.nbytes for parameter in engine.runner.model.parameters()),
        "SSM and conv state": state.conv.nbytes + state.ssm.nbytes,
        "keys and values": state.keys.nbytes + state.values.nbytes,
    }
    rows = {row.name: row.size_bytes for row in plan.table}
    assert {name: size for name, size in held.items() if size} == {
        name: size for name, size in rows.items() if name in held
    }
    assert sum(rows.values()) == plan.memory_bytes == 200 << 20


def test_a_length_beyond_memory_is_refused(random_folder: Path) -> None:
    """Before the weights are loaded, saying what fits."""
    with pytest.raises(CheckpointError, match="beyond what memory holds"):
        make_engine(random_folder, max_model_len=10**8, memory_bytes=2**30)


def test_the_embedded_model_answers() -> None:
    """The trained weights, through everything: a sum with its trace, and a forced answer."""
    engine = make_engine(TINY)
    assert engine.chat is not None
    from batchrun.records import Message

    prompt = engine.chat.encode([Message("user", "What is 37+85+12?")], reasoning=True)
    whole = run_one(engine, prompt.token_ids, thinking=True, max_tokens=96, temperature=0)
    assert (whole.text, whole.reasoning) == ("134", "37+85=122\n+12=134\n")
    assert whole.finish_reason is FinishReason.STOP and not whole.thinking_budget_hit
    cut = run_one(
        engine, prompt.token_ids, thinking=True, max_tokens=96, temperature=0, max_thinking_tokens=0
    )
    assert cut.reasoning is None and cut.thinking_budget_hit
    assert cut.text.isdigit() and cut.num_reasoning_tokens == 0


def favour(engine: Engine, monkeypatch: pytest.MonkeyPatch, choose: Callable[[int], int]) -> None:
    """Make a token by far the likeliest: ``choose`` gives it for each sampling in turn."""
    model = engine.runner.model
    count = 0

    def favouring(batch: object, state: object) -> torch.Tensor:
        nonlocal count
        logits = model(batch, state)
        if len(logits):
            logits[:, choose(count)] += 1000.0
            count += 1
        return logits

    original = engine.step

    def step() -> list[Output]:
        nonlocal count
        if not engine.num_running:
            count = 0
        return original()

    monkeypatch.setattr(engine, "step", step)
    monkeypatch.setattr(engine.runner, "model", favouring)


def test_rows_are_announced_before_the_model_sees_them(random_folder: Path) -> None:
    """Whoever asks is told the keys of those that get a slot, each once, and in time."""
    engine = make_engine(random_folder, max_sequences=2)
    announced: list[Hashable] = []
    engine.on_admit = announced.extend
    for key in "abc":
        engine.add(Request(key, (5, 6, 7), SamplingParams(max_tokens=3, ignore_eos=True)))
    engine.step()
    assert sorted(map(str, announced)) == ["a", "b"]
    while engine.num_unfinished:
        engine.step()
    assert sorted(map(str, announced)) == ["a", "b", "c"]


def limited(engine: Engine, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the device have memory for steps of ``most`` sequences; the sizes of all steps."""
    sizes: list[int] = []
    launch = engine.runner.launch

    def launch_or_fail(step: Step) -> list[Pass]:
        sizes.append(len(step.decodes) + len(step.prefills))
        if sizes[-1] > most:
            for pool in (engine.runner.state.ssm, engine.runner.state.conv):
                pool.fill_(torch.nan)
            raise torch.OutOfMemoryError("no memory for 1 GiB")
        return launch(step)

    monkeypatch.setattr(engine.runner, "launch", launch_or_fail)
    return sizes


def test_out_of_memory_halves_what_runs(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that the device has no memory for costs no row and no token: fewer run from then on,
    and what the broken step left in the states is not used."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)
    requests = [Request(key, tuple(range(5, 9 + key)), params) for key in range(8)]
    whole = run(make_engine(random_folder, max_sequences=8), requests)
    engine = make_engine(random_folder, max_sequences=8)
    for request in requests[:5]:
        engine.add(request)
    for _ in range(4):
        engine.step()
    sizes = limited(engine, 2, monkeypatch)
    outputs = run(engine, requests[5:])
    assert sizes[:2] == [8, 4] and max(sizes[2:]) == 2
    assert {key: output.token_ids for key, output in outputs.items()} == {
        key: output.token_ids for key, output in whole.items()
    }
    assert engine.stats().sampled_tokens == 8 * 12


def test_a_row_that_runs_out_of_memory_alone_is_an_error_row(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to halve: it is the row's error, and the engine goes on."""
    engine = make_engine(random_folder, max_sequences=2)
    limited(engine, 0, monkeypatch)
    outputs = run(engine, [Request("a", (5, 6), SamplingParams(max_tokens=3))])
    error = outputs["a", 0].error
    assert error is not None and error.kind is ErrorKind.ENGINE
    assert error.message == "out of memory with this row alone: no memory for 1 GiB"
    monkeypatch.undo()
    assert run(engine, [Request("b", (5, 6), SamplingParams(max_tokens=3))])["b", 0].error is None
