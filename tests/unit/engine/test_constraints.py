"""Completions that are bound to a response format, and rows beside them that are not."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import pytest
import torch

from batchrun.engine.chat import ChatTemplate
from batchrun.engine.constraints import BoundRow, Constraint, Constraints
from batchrun.engine.engine import Engine
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Output, Request
from batchrun.engine.tokenizer import Tokenizer
from batchrun.formats import ResponseFormat
from batchrun.records import ErrorKind, FinishReason, Message
from tests.unit.engine.support import TINY, make_engine, run, run_one, write_random

WORD = {"type": "string", "maxLength": 8, "pattern": "^[a-z ]*$"}
CLOSED = {"additionalProperties": False}


def closed(**properties: object) -> dict[str, object]:
    """An object of exactly these properties."""
    return {"type": "object", "properties": properties, "required": [*properties], **CLOSED}


SCHEMAS: list[dict[str, object]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -20, "maximum": 300},
    {"type": "integer", "exclusiveMinimum": 6, "exclusiveMaximum": 12, "multipleOf": 5},
    {"type": "number", "minimum": 0.25, "exclusiveMaximum": 2},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[A-C]{2}-[0-9]{3}$"},
    {"type": "string", "pattern": "b", "maxLength": 6},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"enum": ["red", "green", 7, None, {"a": [1]}]},
    {"const": 'the só-called "answer"\n'},
    closed(answer={"type": "integer", "minimum": 0, "maximum": 999}, sure={"type": "boolean"}),
    {"type": "object", "properties": {"a": WORD, "b": WORD}, **CLOSED},
    {"type": "object", "properties": {"a": WORD, "b": WORD}, "minProperties": 1, **CLOSED},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^[xy]$": {"type": "null"}}, "maxProperties": 2}
    | CLOSED,
    {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 4},
    {"type": "array", "items": WORD, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "minItems": 2, "items": False},
    {"anyOf": [{"type": "boolean"}, closed(why=WORD)]},
    {"oneOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
    closed(who=closed(name=WORD, tags={"type": "array", "items": WORD, "maxItems": 2})),
    {
        "$ref": "#/$defs/tree",
        "$defs": {"tree": {"anyOf": [{"type": "null"}, closed(left={"$ref": "#/$defs/tree"})]}},
    },
    {"title": "Verdict", "description": "x", **closed(v={"enum": ["yes", "no"], "default": "no"})},
]
PATTERNS = [
    "(yes|no): [0-9]{2,4}",
    "a|bc",
    r"[a-z/&~]{1,6}\d?",
    r"^(?i)ok[.!]{0,3}$",
    "“[äöü]{2}”",
    r'"[^"\n]{1,5}"',
    r"(?s:x.{0,4}y)",
]
CHOICES = [["yes", "no"], ["yes", "yes please"], ["A", 'a "quoted"\nword/', "größer", "\\d"]]
FORMATS: list[dict[str, Any]] = [
    *({"type": "json_schema", "schema": schema} for schema in SCHEMAS),
    *({"type": "regex", "pattern": pattern} for pattern in PATTERNS),
    *({"type": "choice", "choices": choices} for choices in CHOICES),
]


# A name of any length is allowed here: whether a model ever ends one is the model's affair.
ENDLESS = {
    SCHEMAS.index(
        {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2}
    )
}


def assert_valid(text: str, bound_to: Mapping[str, Any]) -> None:
    """The completion is what its format says."""
    match bound_to["type"]:
        case "json_schema":
            value = json.loads(text, parse_constant=pytest.fail)
            jsonschema.validate(value, bound_to["schema"], jsonschema.Draft202012Validator)
            assert text == text.strip()
        case "regex":
            assert re.fullmatch(bound_to["pattern"].replace("^(?i)", "(?i)^"), text), text
        case "choice":
            assert text in bound_to["choices"]


@pytest.fixture(scope="module")
def tiny() -> Engine:
    """The trained model, which closes its reasoning by itself."""
    return make_engine(TINY, max_sequences=64)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A random model with more rows than the tokenizer has texts: it writes whatever it may."""
    folder = write_random(tmp_path_factory.mktemp("noisy"), vocab_size=448)
    return make_engine(folder, max_sequences=64)


def prompt(chat: ChatTemplate, *, thinking: bool) -> tuple[int, ...]:
    """A question, with the reasoning open or switched off."""
    encoded = chat.encode([Message("user", "What is 3+4?")], reasoning=thinking)
    assert encoded.thinking is thinking
    return encoded.token_ids


def bound_requests(chat: ChatTemplate) -> Iterator[tuple[dict[str, Any], Request]]:
    """Each format, with and without reasoning, under several budgets, greedy and drawn."""
    ways = [(False, None), (True, None), (True, 0), (True, 8)]
    for number, bound_to in enumerate(FORMATS):
        for (thinking, budget), temperature in itertools.product(ways, (0.0, 1.0)):
            params = SamplingParams(
                max_tokens=240,
                answer_reserve=200,
                temperature=temperature,
                max_thinking_tokens=budget,
                response_format=bound_to,
            )
            key = (number, thinking, budget, temperature)
            ids = prompt(chat, thinking=thinking)
            yield bound_to, Request(key, ids, params, seed=number, thinking=thinking)


@pytest.mark.parametrize("name", ["tiny", "noisy"])
def test_every_completion_is_valid(
    name: str, chat: ChatTemplate, request: pytest.FixtureRequest
) -> None:
    """Whatever the model would like to write, a row that stops has a valid completion."""
    engine: Engine = request.getfixturevalue(name)
    cases = list(bound_requests(chat))
    outputs = run(engine, [item for _, item in cases])
    stopped = set()
    for bound_to, item in cases:
        output = outputs[item.key, 0]
        assert output.error is None
        if output.finish_reason is FinishReason.STOP:
            assert_valid(output.text, bound_to)
            stopped.add(FORMATS.index(bound_to))
        sampled = output.num_reasoning_tokens + output.num_completion_tokens
        assert sampled <= 240
        if item.thinking and item.params.max_thinking_tokens is not None:
            assert output.num_reasoning_tokens <= item.params.max_thinking_tokens
        assert (output.reasoning is None) or item.thinking
    assert stopped >= set(range(len(FORMATS))) - ENDLESS
    num_stopped = sum(o.finish_reason is FinishReason.STOP for o in outputs.values())
    assert num_stopped > 0.9 * len(cases)


def test_the_reasoning_is_not_bound(tiny: Engine, chat: ChatTemplate) -> None:
    """The trace is what the model would have written without a format, its close too."""
    ids = prompt(chat, thinking=True)
    params: dict[str, Any] = {"max_tokens": 96, "temperature": 0.0}
    free = run_one(tiny, ids, thinking=True, **params)
    bound_to = {"type": "regex", "pattern": "[A-Z]{3}"}
    bound = run_one(tiny, ids, thinking=True, response_format=bound_to, **params)
    assert free.text == "7" and re.fullmatch("[A-Z]{3}", bound.text)
    assert bound.reasoning == free.reasoning == "3+4=7\n"
    assert bound.num_reasoning_tokens == free.num_reasoning_tokens
    assert not bound.thinking_budget_hit


@pytest.mark.parametrize("deterministic", [False, True])
def test_free_rows_beside_bound_ones(chat: ChatTemplate, deterministic: bool) -> None:
    """A row without a format has the same tokens alone and in a mixed batch; a bound one too."""
    engine = make_engine(TINY, max_sequences=16, deterministic=deterministic)
    ids = prompt(chat, thinking=True)

    def request(number: int) -> Request:
        bound_to = FORMATS[12] if number % 2 else None
        params = SamplingParams(
            max_tokens=64,
            temperature=1.0,
            response_format=bound_to,
            stop_token_ids=(390 + number // 4,),
        )
        return Request(number, ids, params, seed=number, thinking=True)

    mixed = run(engine, [request(number) for number in range(8)])
    for number in range(8):
        alone = run(engine, [request(number)])
        assert alone[number, 0].token_ids == mixed[number, 0].token_ids


def test_a_bound_row_with_everything_else(noisy: Engine, chat: ChatTemplate) -> None:
    """Penalty, cuts, log-probabilities of the model before the mask, samples of one prompt."""
    ids = prompt(chat, thinking=False)
    options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01}
    options |= {"repetition_penalty": 1.3, "logprobs": 1, "max_tokens": 60}
    params = SamplingParams(response_format=FORMATS[27], n=6, **options)
    requests = [Request("a", ids, params, seed=3, sample=sample) for sample in range(6)]
    outputs = run(noisy, requests)
    for output in outputs.values():
        assert_valid(output.text, FORMATS[27])
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
    assert len({output.token_ids for output in outputs.values()}) > 1
    # Were they of the masked distribution, forced characters would have a log-probability of 0.
    assert max(value for o in outputs.values() for value in o.logprobs or () if value) < -0.01


def test_max_tokens_inside_a_value(noisy: Engine, chat: ChatTemplate) -> None:
    """The text stays as far as it came, and the finish reason is length."""
    bound_to = {"type": "regex", "pattern": "[0-9]{30}"}
    ids = prompt(chat, thinking=False)
    output = run_one(noisy, ids, response_format=bound_to, max_tokens=7)
    assert output.finish_reason is FinishReason.LENGTH
    assert re.fullmatch("[0-9]{7,}", output.text) and len(output.text) < 30
    # Complete at the very last token: that is an end of its own.
    last = run_one(noisy, ids, response_format={"type": "regex", "pattern": "[0-9]"}, max_tokens=1)
    assert (last.finish_reason, len(last.text)) == (FinishReason.STOP, 1)


class Script:
    """In place of the model: wants one token after the other, and likes the rest equally little."""

    def __init__(self, wanted: Sequence[int], vocab_size: int) -> None:
        self._wanted = list(wanted)
        self._vocab_size = vocab_size

    def __call__(self, batch: Any, state: object) -> torch.Tensor:
        logits = torch.full((len(batch.token_ids[batch.logit_rows]), self._vocab_size), -1.0)
        if len(logits):
            logits[:, self._wanted.pop(0) if self._wanted else 0] = 9.0
        return logits


@pytest.fixture
def scripted(tmp_path: Path) -> Engine:
    """An engine of 408 tokens, 400 of the tiny model and some that end ``</think>`` and go on."""
    folder = write_random(tmp_path / "scripted", vocab_size=416)
    shutil.copy(TINY / "tokenizer.json", folder / "tokenizer.json")
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for number, token in enumerate((">{", ">No", ">ĊĊ", ">ĊyesĊ", "k></", "think>ye", ">ye")):
        definition["model"]["vocab"][token] = 400 + number
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    return make_engine(folder)


def follow(engine: Engine, wanted: Sequence[str | int], **params: Any) -> Output:
    """The output of a model that wants these texts, the last of them a token where it is one."""
    assert engine.tokenizer is not None
    ids: list[int] = []
    for item in wanted:
        ids += [item] if isinstance(item, int) else engine.tokenizer.encode_plain(item)
    engine.runner.model = Script(ids, engine.config.vocab_size)  # type: ignore[assignment]
    thinking = params.pop("thinking", True)
    params = {"temperature": 0, "max_tokens": 60, "answer_reserve": 10, **params}
    return run_one(engine, [20, 21], thinking=thinking, **params)


YES = {"type": "choice", "choices": ["yes", "yes, all"]}
STOP = 12


def test_the_token_that_ends_the_reasoning_may_carry_the_answer(scripted: Engine) -> None:
    """Its bytes behind the tag count; tokens that go on as the format cannot are refused."""
    good = follow(scripted, ["a\n</think", 406, "s", STOP], response_format=YES)
    assert (good.text, good.reasoning, good.finish_reason) == ("yes", "a\n", FinishReason.STOP)
    space = follow(scripted, ["a\n</think", 402, "yes", STOP], response_format=YES)
    assert (space.text, space.reasoning) == ("yes", "a\n")
    longer = follow(scripted, ["a\n</", 405, "s, all"], response_format=YES)
    assert (longer.text, longer.reasoning) == ("yes, all", "a\n")
    assert longer.token_ids[-1] != STOP  # nothing can follow: no token is spent on saying so
    for token_id in (400, 401, 403):
        refused = follow(scripted, ["a\n</think", token_id], response_format=YES)
        assert token_id not in refused.token_ids
        free = follow(scripted, ["a\n</think", token_id])
        assert token_id in free.token_ids
    # Nothing that only looks like an end is refused.
    odd = follow(scripted, ["a\n</thin", 404, "think>yes", STOP], response_format=YES)
    assert 404 not in odd.token_ids
    inside = follow(scripted, ["a", 401, "\n</think>yes", STOP], response_format=YES)
    assert (inside.text, inside.reasoning) == ("yes", "a>No\n")


def test_white_space_after_the_tag_is_free_and_bounded(scripted: Engine) -> None:
    """It is no part of the completion; more than a little of it is refused."""
    output = follow(scripted, ["a\n</think>\n\n \tyes", STOP], response_format=YES)
    assert output.text == "yes"
    endless = follow(scripted, ["a\n</think>", *["\n"] * 30], response_format=YES)
    assert endless.text.startswith("yes") and endless.token_ids.count(211) < 12


def test_stop_tokens_only_where_the_format_is_complete(scripted: Engine) -> None:
    """Not in the reasoning, not inside a value, but as soon as the text may be all."""
    output = follow(
        scripted, ["a", STOP, "\n</think>", STOP, "y", STOP, "s", STOP], response_format=YES
    )
    assert output.token_ids.count(STOP) == 1 and output.token_ids[-1] == STOP
    assert output.finish_reason is FinishReason.STOP
    own = follow(
        scripted, ["ye", 13, "s", 13], response_format=YES, thinking=False, stop_token_ids=[13]
    )
    assert (own.text, own.token_ids[-1]) == ("yes", 13)


def test_no_token_without_a_text(scripted: Engine) -> None:
    """Special tokens and the rows of the model beyond the tokenizer's are never drawn."""
    anything = {"type": "regex", "pattern": "(?s:.{1,9})"}
    wanted = [*range(13), *range(407, 416)]
    params: dict[str, Any] = {"thinking": False, "max_tokens": 2, "ignore_eos": True}
    for token_id in wanted:
        output = follow(scripted, [token_id], response_format=anything, **params)
        assert token_id not in output.token_ids
        assert token_id in follow(scripted, [token_id], **params).token_ids
    constraints = scripted.runner.constraints
    assert constraints is not None
    bound_to = ResponseFormat.parse(anything)
    for stop_ids in (frozenset[int](), frozenset({2, 12})):
        start = constraints.begin(bound_to, thinking=False, stop_ids=stop_ids)
        start.take(20)
        masks, empty = constraints.masks([BoundRow(start, None, True)], torch.device("cpu"))
        allowed = {i for i in range(416) if masks[0, i // 32] >> (i % 32) & 1}
        assert allowed & {*range(13), *range(407, 416)} == stop_ids
        assert len(allowed) > 250
        assert not len(empty)


def test_stop_strings_min_tokens_and_ignore_eos(scripted: Engine) -> None:
    """A stop string cuts as always; min_tokens holds stop tokens back if something can follow."""
    stops = ["s,"]
    cut = follow(scripted, ["</think>yes, all"], response_format=YES, stop=stops)
    assert (cut.text, cut.finish_reason) == ("ye", FinishReason.STOP)
    held = follow(scripted, ["yes", STOP], response_format=YES, thinking=False, min_tokens=8)
    assert held.text == "yes, all"
    ignored = follow(scripted, ["yes", STOP], response_format=YES, thinking=False, ignore_eos=True)
    assert (ignored.text, ignored.finish_reason) == ("yes, all", FinishReason.STOP)


def test_where_no_token_is_left(scripted: Engine) -> None:
    """A valid completion ends there; another is an error row of the kind engine."""
    # "," can only be written by a token that is a stop token: nothing may follow "yes".
    comma = scripted.tokenizer.encode_plain(",") if scripted.tokenizer else []
    ended = follow(
        scripted,
        ["yes"],
        response_format=YES,
        thinking=False,
        stop_token_ids=comma,
        ignore_eos=True,
        min_tokens=9,
    )
    assert (ended.text, ended.finish_reason, ended.error) == ("yes", FinishReason.STOP, None)
    dead = follow(
        scripted,
        ["a"],
        response_format={"type": "choice", "choices": ["a,b"]},
        thinking=False,
        stop_token_ids=comma,
        ignore_eos=True,
    )
    assert dead.error is not None and dead.error.kind is ErrorKind.ENGINE
    assert "no token can come next" in dead.error.message


def test_an_error_of_a_matcher_is_its_row_s_error(
    tiny: Engine, chat: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row fails with the kind engine; its neighbours have what they would have had."""
    ids = prompt(chat, thinking=False)

    def request(number: int) -> Request:
        params = SamplingParams(max_tokens=40, temperature=0.0, response_format=FORMATS[12])
        return Request(number, ids, params, seed=number)

    good = run(tiny, [request(1)])[1, 0]
    take, broken = Constraint.take, set[int]()

    def failing(self: Constraint, token_id: int) -> None:
        if not broken or id(self) in broken:
            broken.add(id(self))
            token_id = 0  # which no text has
        take(self, token_id)

    monkeypatch.setattr(Constraint, "take", failing)
    outputs = run(tiny, [request(0), request(1)])
    error = outputs[0, 0].error
    assert error is not None and str(error).startswith("engine: response_format: ")
    assert "\n" not in error.message
    assert outputs[1, 0].token_ids == good.token_ids


@pytest.mark.parametrize(
    ("bound_to", "said"),
    [
        ({"type": "regex", "pattern": "(a"}, "unclosed group"),
        ({"type": "regex", "pattern": r"(a)\1"}, "backreferences are not supported"),
        ({"type": "regex", "pattern": "a(?=b)"}, "look-around"),
        ({"type": "regex", "pattern": "()"}, "only an empty completion is valid"),
        ({"type": "regex", "pattern": "[a&&b]"}, "no completion can be valid"),
        (
            {"type": "json_schema", "schema": {"type": "integer", "minimum": 2, "maximum": 1}},
            "minimum (2) is greater than maximum (1)",
        ),
        (
            {"type": "json_schema", "schema": {"allOf": [{"type": "null"}, {"type": "string"}]}},
            "incompatible types",
        ),
        (
            {"type": "json_schema", "schema": {"type": "string", "pattern": "^a$", "minLength": 2}},
            "Regex is empty",
        ),
        ({"type": "json_schema", "schema": {"type": "text"}}, "Invalid type: text"),
        ({"type": "json_schema", "schema": {"type": "string", "format": "colour"}}, "format"),
        ({"type": "json_schema", "schema": {"$ref": "#/$defs/a"}}, "does not exist"),
        (
            {"type": "json_schema", "schema": {"oneOf": [{"type": "number"}, {"minimum": 1}]}},
            "oneOf is supported only where its options exclude one another",
        ),
    ],
)
def test_formats_that_cannot_be_used(tiny: Engine, bound_to: dict[str, object], said: str) -> None:
    """They are found when they are compiled, and come out as the row's error, never as a crash."""
    params = SamplingParams(response_format=bound_to)
    error = tiny.admission_error(4, params)
    assert error is not None and error.kind is ErrorKind.ENGINE
    assert said in error.message and "\n" not in error.message
    output = run(tiny, [Request("a", (20, 21), params)])["a", 0]
    assert output.error == error


def test_a_pattern_that_begins_with_white_space(tiny: Engine) -> None:
    """It can be used without reasoning; after it, white space is no part of the completion."""
    params = SamplingParams(response_format={"type": "regex", "pattern": r"\s+a"}, max_tokens=30)
    assert tiny.admission_error(4, params) is None
    error = tiny.admission_error(4, params, thinking=True)
    assert error is not None and "white space is dropped" in error.message
    output = run_one(tiny, [20], response_format={"type": "regex", "pattern": r"\s{2}a"})
    assert re.fullmatch(r"\s{2}a", output.text)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    """Tokens that have no text cannot be bound, and the row says so."""
    engine = make_engine(write_random(tmp_path / "bare", tokenizer=False))
    output = run_one(engine, [20], response_format=YES)
    assert output.error is not None and "no tokenizer" in output.error.message


def test_a_grammar_is_compiled_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of one format share its grammar, with and without reasoning one each."""
    constraints = Constraints(tokenizer, 400)
    compiled = []
    real = llguidance.LLMatcher

    def counting(*args: Any, **options: Any) -> Any:
        compiled.append(args)
        return real(*args, **options)

    monkeypatch.setattr("batchrun.engine.constraints.llguidance.LLMatcher", counting)
    for thinking in (True, False) * 5:
        bound_to = ResponseFormat.parse(YES)
        assert constraints.error(bound_to, thinking=thinking) is None
        constraints.begin(bound_to, thinking=thinking, stop_ids=frozenset())
    assert len(compiled) == 4  # each grammar, and its start alone


def test_masks_by_several_threads(tokenizer: Tokenizer) -> None:
    """A pool of threads gives the bits that one thread gives, each row its own."""
    words = [f"{letter}x" for letter in "abcdefgh"]
    masks = []
    for num_threads in (1, 2):
        constraints = Constraints(tokenizer, 400, num_threads=num_threads)
        rows = []
        for number, word in enumerate(words):
            bound_to = ResponseFormat.parse({"type": "choice", "choices": [word]})
            stop_ids = frozenset({number % 3})
            start = constraints.begin(bound_to, thinking=False, stop_ids=stop_ids)
            rows.append(BoundRow(start, None, True))
        # One row is still in its reasoning, where any token but its stop token may come.
        rows[3] = BoundRow(rows[3].constraint, 0, True)
        bits, empty = constraints.masks(rows, torch.device("cpu"))
        assert not len(empty)
        masks.append(bits.clone())
    assert torch.equal(masks[0], masks[1])
    counts = [sum(int(w).bit_count() for w in row.numpy().view("u4")) for row in masks[0]]
    assert counts[:3] == [1, 1, 1] and counts[3] >= 399
