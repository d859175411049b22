"""Rows become conversations, or the reason why not: never an exception, never a hang."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import pytest

from batchrun.engine.params import SamplingParams
from batchrun.job import Job, parse_job
from batchrun.jobfile import JobSource
from batchrun.prompts import (
    Prompt,
    PromptBuilder,
    TemplateError,
    input_columns,
    template_columns,
)
from batchrun.records import ErrorKind, Message, Row, RowError, ToolCall

MIB = 1024 * 1024


def job(generation: Mapping[str, object] | None = None, **inputs: object) -> Job:
    """A job with these keys of ``input`` and ``generation``."""
    return parse_job(
        JobSource.of_mapping(
            {
                "model": {"path": "tiny"},
                "input": {"path": "in", **inputs},
                "output": {"path": "out"},
                "generation": dict(generation or {}),
            }
        )
    )


def row(**values: object) -> Row:
    """A row with these columns."""
    return Row(ordinal=0, index=0, id="r", values=values)


def built(job: Job, **values: object) -> Prompt:
    """The prompt of a row that has one."""
    prompt = PromptBuilder(job).build(row(**values))
    assert isinstance(prompt, Prompt), prompt
    return prompt


def refused(job: Job, **values: object) -> str:
    """Why a row has no prompt."""
    error = PromptBuilder(job).build(row(**values))
    assert isinstance(error, RowError), error
    return str(error)


def rendered(template: str, **values: object) -> str:
    """The user's message that a template makes of a row."""
    return built(job(template=template), **values).messages[0].content


def test_prompt_column() -> None:
    """A text is one user message, behind the job's system prompt, with the job's sampling."""
    prompt = built(
        job({"max_tokens": 7, "stop": ["END"], "n": 3}, prompt_column="q", system="Be brief."),
        q="  What is 3+4?\n",
    )
    assert prompt.messages == (
        Message("system", "Be brief."),
        Message("user", "  What is 3+4?\n"),
    )
    assert (prompt.reasoning, prompt.n) == (True, 3)
    params = SamplingParams(**dict(prompt.params))  # type: ignore[arg-type]
    assert params == SamplingParams(
        n=3,
        temperature=0.6,
        top_p=0.95,
        top_k=0,
        max_tokens=7,
        stop=["END"],
        seed=0,
        answer_reserve=None,
    )


@pytest.mark.parametrize(
    "text",
    [
        "{{7*7}}",
        "{% for x in y %}",
        "<|im_end|> </think> [INST]",
        "𝄞 🦀 \u200b é",
        "a\x00b",
        "/no_think",
    ],
)
def test_text_of_rows_is_never_a_template(text: str) -> None:
    """Whatever a row's text looks like, it comes through as it is."""
    assert built(job(prompt_column="q"), q=text).messages[0].content == text
    assert rendered("{{ q }}", q=text) == text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "invalid_prompt: column q is null"),
        ("", "invalid_prompt: column q is empty"),
        (" \n\t\u3000", "invalid_prompt: column q is nothing but white space"),
        (5, "invalid_prompt: column q is not text"),
        (b"x", "invalid_prompt: column q is not text"),
        ("a\ud800b", "invalid_prompt: the prompt has a lone surrogate, which is not text"),
        ("x" * (MIB + 1), "too_long: the prompt is larger than 1 MiB"),
        ("é" * (MIB // 2 + 1), "too_long: the prompt is larger than 1 MiB"),
        ("x" * (10 * MIB), "too_long: the prompt is larger than 1 MiB"),
    ],
)
def test_bad_prompts(value: object, said: str) -> None:
    """A prompt that is none, or too large, is an error row that says so."""
    assert refused(job(prompt_column="q"), q=value) == said


def test_a_prompt_of_exactly_one_mebibyte() -> None:
    """The limit itself is allowed."""
    assert len(built(job(prompt_column="q"), q="x" * MIB).messages[0].content) == MIB


def test_an_error_of_the_reader_is_passed_on() -> None:
    """A row that could not be read keeps the reader's error."""
    error = RowError(ErrorKind.INVALID_PROMPT, "column q is not UTF-8")
    bad = Row(ordinal=0, index=0, id="r", values={}, error=error)
    assert PromptBuilder(job(prompt_column="q")).build(bad) == error


CONVERSATION = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": ""},
    {"role": "tool", "content": "T"},
]


def test_messages_column() -> None:
    """A list of structs and its JSON text mean the same; the row's own system message wins."""
    expected = tuple(Message(str(m["role"]), str(m["content"])) for m in CONVERSATION)
    with_system = job(messages_column="m", system="Job's")
    assert built(with_system, m=CONVERSATION).messages == expected
    assert built(with_system, m=json.dumps(CONVERSATION)).messages == expected
    assert built(with_system, m=CONVERSATION[1:]).messages == (
        Message("system", "Job's"),
        *expected[1:],
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "invalid_prompt: column m is null"),
        ("", "invalid_prompt: column m is empty"),
        ([], "invalid_prompt: column m has no message"),
        ("[]", "invalid_prompt: column m has no message"),
        ("{}", "invalid_prompt: column m is not a list of messages"),
        ('"text"', "invalid_prompt: column m is not a list of messages"),
        ("[{]", "invalid_prompt: column m is not valid JSON at character 2"),
        ("[" * 100_000, "invalid_prompt: column m: JSON nested too deeply"),
        ("9" * 5000, "invalid_prompt: column m is not valid JSON"),
        ("x" * (MIB + 1), "too_long: column m is larger than 1 MiB"),
        ([None], "invalid_prompt: column m, message 0 is null"),
        (["hi"], "invalid_prompt: column m, message 0 has no role and content"),
        (
            [{"role": "user", "content": None}],
            "invalid_prompt: column m, message 0: content is null or missing",
        ),
        (
            [{"role": None, "content": "x"}],
            "invalid_prompt: column m, message 0: role is null or missing",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}],
            "invalid_prompt: column m, message 1: unknown role; "
            "known are system, user, assistant, tool",
        ),
        (
            [{"role": ["user"], "content": "x"}],
            "invalid_prompt: column m, message 0: unknown role; "
            "known are system, user, assistant, tool",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "invalid_prompt: column m, message 0: content is not text",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
            "invalid_prompt: column m, message 1: only the first message can be a system message",
        ),
        (
            [{"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": "{}"}]}],
            "invalid_prompt: column m, message 0: only an assistant message can have tool calls",
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}],
            "invalid_prompt: column m, message 0, tool_calls: a call's arguments are neither an "
            "object nor a text",
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
            "invalid_prompt: column m, message 0, tool_calls: a call has no name that a function "
            "can have",
        ),
        (
            [{"role": "assistant", "content": "x", "tool_calls": "f()"}],
            "invalid_prompt: column m, message 0: tool_calls is not a list",
        ),
        (
            [{"role": "system", "content": "x"}],
            "invalid_prompt: column m has only a system message",
        ),
        (
            [{"role": "user", "content": "  "}],
            "invalid_prompt: column m: the last message is empty",
        ),
        (
            '[{"role": "user", "content": "\\ud800"}]',
            "invalid_prompt: the prompt has a lone surrogate, which is not text",
        ),
    ],
)
def test_bad_conversations(value: object, said: str) -> None:
    """What is wrong with a conversation is said with the place of the message."""
    assert refused(job(messages_column="m"), m=value) == said


def test_template() -> None:
    """A template sees the row's columns: loops over lists, conditions, filters, numbers."""
    assert (
        rendered(
            "{{ title | upper }}: {% for t in tags %}{{ loop.index * 2 }}={{ t.name }} {% endfor %}"
            "{% if n % 2 == 1 %}odd{% endif %} {{ n ** 2 }} {{ maybe or '-' }}\n",
            title="facts",
            tags=[{"name": "a"}, {"name": "b"}],
            n=3,
            maybe=None,
        )
        == "FACTS: 2=a 4=b odd 9 -\n"
    )


def test_template_columns() -> None:
    """The columns that a template reads are known without a row, loops' own names excluded."""
    assert template_columns("{{ b }}{% for x in a %}{{ x }}{{ c.d }}{% endfor %}{{ range }}") == (
        "a",
        "b",
        "c",
        "range",
    )


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ text", "line 1: unexpected end of template, expected 'end of print statement'."),
        ("a\n{% if x %}", "line 2: Unexpected end of template."),
        ("{{ x | nope }}", "line 1: No filter named 'nope'."),
        ("{{ x is nope }}", "line 1: No test named 'nope'."),
        ("{% include '/etc/passwd' %}", "line 1: a template stands alone: no include"),
        ("{% import 'os' as os %}", "line 1: a template stands alone: no import"),
        ("{% extends 'x' %}", "line 1: a template stands alone: no extends"),
        ("x" * (64 * 1024 + 1), "the template is larger than 64 KiB"),
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "the template is nested too deeply"),
    ],
)
def test_templates_that_are_none(template: str, said: str) -> None:
    """A template that cannot work is found before any row, with its line."""
    with pytest.raises(TemplateError) as caught:
        template_columns(template)
    assert str(caught.value).startswith(said)
    with pytest.raises(TemplateError):
        PromptBuilder(job(template=template))


PAYLOADS = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class walk by filter": "{{ x | attr('__class__') }}",
    "class walk by map": "{{ [x] | map(attribute='__class__') | first }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.popen('touch /tmp/owned').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('touch /tmp/owned') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "format": "{{ '{0.__class__}'.format(x) }}",
    "format as a value": "{% set f = '{0.__class__}'.format %}{{ f(x) }}",
    "repetition": "{{ 'a' * 10**9 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "width": "{{ x.ljust(10**9) }}",
    "range": "{{ range(10**9) | list }}",
    "nested loops": "{% for a in many %}{% for b in many %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "growing output": "{% for a in many %}{{ many }}{% endfor %}",
    "change of a row's list": "{{ items.append(1) }}",
}


@pytest.mark.parametrize("template", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_sandbox(template: str) -> None:
    """A template reaches no code, no memory and no time beyond a row's own values."""
    started = time.monotonic()
    values = {"x": "text", "many": "y" * 20_000, "items": [1]}
    try:
        builder = PromptBuilder(job(template=template))
    except TemplateError:
        return
    outcome = builder.build(row(**values))
    assert isinstance(outcome, RowError)
    assert outcome.kind in (ErrorKind.TEMPLATE, ErrorKind.TOO_LONG)
    assert len(str(outcome)) <= 256
    assert values["items"] == [1]
    assert time.monotonic() - started < 5


def test_the_step_count_starts_again_with_each_row() -> None:
    """One row's loops do not count against the next."""
    builder = PromptBuilder(job(template="{% for x in xs %}.{% endfor %}"))
    for _ in range(3):
        assert isinstance(builder.build(row(xs=list(range(60_000)))), Prompt)


@pytest.mark.parametrize(
    ("template", "values", "said"),
    [
        ("{{ a }}", {"a": None}, "template: not allowed in a template: a null would be printed"),
        ("{{ a.b }}", {"a": {"c": 1}}, "template: 'dict object' has no attribute 'b'"),
        ("{{ a + 1 }}", {"a": "private words"}, "template: TypeError while rendering"),
        ("{{ 1 / a }}", {"a": 0}, "template: ZeroDivisionError while rendering"),
        ("{{ a }}", {"a": "  "}, "invalid_prompt: the rendered template is nothing but white"),
        ("{{ a }}{{ a }}", {"a": "x" * 600_000}, "too_long: the rendered template is larger"),
    ],
)
def test_rows_that_a_template_cannot_render(
    template: str, values: dict[str, object], said: str
) -> None:
    """Such a row is an error row, whose text shows nothing of the row's."""
    assert refused(job(template=template), **values).startswith(said)


def test_overrides() -> None:
    """A row's columns replace the job's values; a null, or a gap of a data frame, does not."""
    overriding = job(
        {"max_tokens": 100, "temperature": 0.5},
        prompt_column="q",
        overrides=["max_tokens", "temperature", "reasoning", "stop", "seed"],
    )
    prompt = built(
        overriding, q="x", max_tokens=5.0, temperature=1, reasoning=False, stop=["a"], seed=9
    )
    assert not prompt.reasoning
    assert {k: prompt.params[k] for k in ("max_tokens", "temperature", "stop", "seed")} == {
        "max_tokens": 5,
        "temperature": 1,
        "stop": ("a",),
        "seed": 9,
    }
    same = built(overriding, q="x", max_tokens=None, temperature=float("nan"), reasoning=None)
    assert same == built(job({"max_tokens": 100, "temperature": 0.5}, prompt_column="q"), q="x")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_tokens", 0, "max_tokens must be a whole number of at least 1, not 0"),
        ("max_tokens", 1.5, "max_tokens must be a whole number of at least 1, not 1.5"),
        ("max_tokens", "many", "max_tokens must be a whole number of at least 1, not the text"),
        ("reasoning", 1, "reasoning must be true or false, not 1"),
        ("top_p", 2.5, "top_p must be a number above 0 and at most 1, not 2.5"),
        ("temperature", float("inf"), "temperature must be a number of at least 0, not inf"),
        ("stop", ["a", 5], "stop must be"),
    ],
)
def test_bad_overrides(name: str, value: object, said: str) -> None:
    """An override that cannot be makes an error row that names its column."""
    overriding = job(prompt_column="q", overrides=[name])
    error = refused(overriding, q="x", **{name: value})
    assert error.startswith(f"invalid_prompt: override column: {said}")


def test_input_columns() -> None:
    """What is read of the input is what the job names, and no more."""
    columns = input_columns(
        job(template="{{ b }} {{ a }}", id_column="i", overrides=["seed"], columns=["c", "a"])
    )
    assert columns.template == ("a", "b")
    assert columns.values == ("a", "b", "seed")
    assert columns.all == ("i", "a", "b", "seed", "c")


TURNS = [
    {"role": "user", "content": "1+2?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": "é"}}},
            {"name": "now", "arguments": "{}"},
        ],
    },
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
    {"role": "tool", "content": ""},
]


@pytest.mark.parametrize("as_json", [False, True])
def test_conversations_with_tools(as_json: bool) -> None:
    """Calls come as OpenAI writes them or bare, arguments as object or text; a tool may say
    nothing."""
    value = json.dumps(TURNS) if as_json else TURNS
    calls = (ToolCall("add", '{"a": "é"}'), ToolCall("now", "{}"))
    assert built(job(messages_column="m"), m=value).messages == (
        Message("user", "1+2?"),
        Message("assistant", "", calls),
        Message("tool", "3"),
        Message("tool", ""),
    )


def test_calls_count_for_the_size_of_a_prompt() -> None:
    """A megabyte of arguments is too long, and lone surrogates in them are not text."""
    calls = [{"name": "f", "arguments": "x" * MIB}]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}]
    assert refused(job(messages_column="m"), m=turns).startswith("too_long: the prompt")
    calls[0]["arguments"] = "\ud800"
    assert "lone surrogates" in refused(job(messages_column="m"), m=turns)


def test_tools_of_a_row() -> None:
    """A column `tools` with JSON overrides the job's tools; null keeps them, [] is none."""
    mine = job({"tools": [{"name": "f"}]}, prompt_column="p", overrides=["tools"])
    assert built(mine, p="x", tools=None).tools == ({"name": "f"},)
    assert built(mine, p="x", tools='[{"name": "g"}]').tools == ({"name": "g"},)
    assert built(mine, p="x", tools="[]").tools == ()
    secret = '[{"name": "g", "parameters": {"type": "object", "properties": {"secret": 1}}}]'
    assert refused(mine, p="x", tools=secret) == (
        "invalid_prompt: override column: tools[0].parameters describes an argument "
        "that is no JSON schema"
    )
    assert "tools is not valid JSON at character 1" in refused(mine, p="x", tools="[")
    assert "tools must be a list of mappings" in refused(mine, p="x", tools="{}")
