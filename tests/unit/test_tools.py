"""Tool calls in what a model says: found, or the text as it was; never an exception."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchrun.records import ToolCall
from batchrun.tools import CLOSE, OPEN, Reply, as_functions, is_malformed, parse_calls

NAMES = st.from_regex(r"[\w.:/-]{1,20}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from([OPEN, CLOSE, "[", "]}", '"', "\\", "</think>", "é😀", "\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)  # fmt: skip
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(st.text(max_size=5), VALUES)), min_size=1, max_size=3
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: OPEN not in text
)
FRAGMENTS = st.lists(
    st.sampled_from(
        [OPEN, CLOSE, "[", "]", "{", "}", '"name"', '"arguments"', ":", ",", '"f"', "{}", " ", "x"]
    ),
    max_size=24,
).map("".join)


def block(calls: object) -> str:
    """What the model writes for calls."""
    return f"{OPEN}{json.dumps(calls, ensure_ascii=False)}{CLOSE}"


@given(st.text() | FRAGMENTS)
@example(f"{OPEN}{'[' * 100_000}")
@example(f"{OPEN}[{'9' * 10_000}]{CLOSE}")
@example(f'{OPEN}[{{"name": "\\ud800", "arguments": {{}}}}]{CLOSE}')
@settings(deadline=None)
def test_any_text_survives(text: str) -> None:
    """Whatever a model says, there are calls, or the text is as it was."""
    reply = parse_calls(text)
    if reply.calls is None:
        assert reply.text == text
        assert is_malformed(reply.text, reply.calls) == (OPEN in text)
    else:
        assert reply.calls and all(call.name for call in reply.calls)
        assert text.count(OPEN) >= 1 and len(reply.text) < len(text)
        assert not is_malformed(reply.text, reply.calls)


@given(TEXTS, st.lists(st.tuples(CALLS, TEXTS), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_calls_come_back_and_the_text_around_them(
    before: str, blocks: list[tuple[list[tuple[str, dict[str, object]]], str]]
) -> None:
    """Several blocks, nested brackets, tags inside of texts, every plane of Unicode."""
    said, around = before, before
    expected: list[tuple[str, object]] = []
    for calls, after in blocks:
        said += block([{"name": name, "arguments": value} for name, value in calls]) + after
        around += after
        expected += calls
    if OPEN in around:  # two texts that meet may spell the tag
        return
    reply = parse_calls(said)
    assert reply.calls is not None
    assert [(call.name, json.loads(call.arguments)) for call in reply.calls] == expected
    assert reply.text == (around if around.strip() else "")


@given(CALLS, st.data())
@settings(deadline=None, max_examples=40)
def test_a_call_that_is_cut_is_text(
    calls: list[tuple[str, dict[str, object]]], data: st.DataObject
) -> None:
    """A completion that ends inside a block, as max_tokens may end it, has no calls."""
    said = "ok " + block([{"name": name, "arguments": value} for name, value in calls])
    cut = said[: data.draw(st.integers(len("ok " + OPEN), len(said) - 1))]
    assert parse_calls(cut) == Reply(cut, None)
    assert is_malformed(cut, None)


def test_arguments_are_json_text() -> None:
    """An object becomes JSON in plain Unicode, a text stays as the model wrote it."""
    said = 'Sure.\n<TOOLCALL>[{"name": "f", "arguments": {"a":1.5,"b":[ ],"c":"é"}},\n'
    said += ' {"name": "g", "arguments": "x=1", "id": 7}] </TOOLCALL>'
    assert parse_calls(said) == Reply(
        "Sure.\n", (ToolCall("f", '{"a": 1.5, "b": [], "c": "é"}'), ToolCall("g", "x=1"))
    )
    line_break = '<TOOLCALL>[{"name": "f", "arguments": {"code": "a\nb"}}]</TOOLCALL>'
    assert parse_calls(line_break) == Reply("", (ToolCall("f", '{"code": "a\\nb"}'),))
    half = '<TOOLCALL>[{"name": "f", "arguments": {"x": "\\ud83d"}}]</TOOLCALL>'
    assert parse_calls(half).calls == (ToolCall("f", '{"x": "\\ud83d"}'),)


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "[]",
        "{}",
        '{"name": "f", "arguments": {}}',
        '[{"name": "f", "arguments": {}}',
        '[{"name": "f", "arguments": {}}] x',
        '[{"name": "f"}]',
        '[{"name": "f", "arguments": null}]',
        '[{"name": "f", "arguments": [1]}]',
        '[{"name": "", "arguments": {}}]',
        '[{"name": "a b", "arguments": {}}]',
        '[{"name": 3, "arguments": {}}]',
        '[{"arguments": {}}]',
        '["f"]',
        "[null]",
        '[{{"name": "f", "arguments": {}}}]',
        '[{"name": "f", "arguments": {"x": NaN}}]',
        '[{"name": "f", "arguments": {"x": 1e999}}]',
        '[{"name": "f", "arguments": "\\ud800"}]',
        "f(x=1)",
    ],
)
def test_malformed_calls_are_text(inner: str) -> None:
    """What is no JSON list of calls stays in the completion, and so do good calls beside it."""
    good = '<TOOLCALL>[{"name": "f", "arguments": {}}]</TOOLCALL>'
    for said in (f"a{OPEN}{inner}{CLOSE}b", f"{good}{OPEN}{inner}{CLOSE}", OPEN + inner):
        assert parse_calls(said) == Reply(said, None)
        assert is_malformed(said, None)


def test_what_is_no_call_at_all() -> None:
    """Text without the tag is neither a call nor a malformed one."""
    for said in ("", "7", f"{CLOSE} [1]", "<toolcall>[]</toolcall>"):
        assert parse_calls(said) == Reply(said, None)
        assert not is_malformed(said, None)
    assert not is_malformed(None, None)


def test_functions_have_one_shape() -> None:
    """Wrapped and bare schemas reach the template alike."""
    bare = {"name": "f", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": bare, "strict": True}
    expected = {"type": "function", "function": bare}
    assert as_functions([bare, wrapped]) == (expected, expected)
