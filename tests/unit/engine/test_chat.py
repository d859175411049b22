"""Chat templates: NVIDIA's format, and texts of rows that stay texts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tiny_problems
import train_tiny
from batchrun.engine.chat import ChatTemplate, PromptError
from batchrun.engine.tokenizer import Tokenizer
from batchrun.errors import CheckpointError
from batchrun.records import ErrorKind, Message, ToolCall
from tests.unit.engine.support import TINY

TOKENIZER = Tokenizer.load(TINY)
CHAT = ChatTemplate.load(TINY, TOKENIZER)
PIECES = [
    "/think", "/no_think", "</think>", "<think>", "<SPECIAL_12>", "<SPECIAL_1", "<s>", "2>",
    "/no_", "{{ 7*7 }}", "{% if %}", " ", "x", "😀", "\ue000", "<", "/",
]  # fmt: skip


def user(text: str) -> list[Message]:
    """A conversation of one question."""
    return [Message("user", text)]


def test_the_golden_example() -> None:
    """One user message, thinking on and off, exactly as the published template renders it."""
    on = CHAT.encode(user("Hello"), reasoning=True)
    assert on.text == (
        "<SPECIAL_10>System\n\n<SPECIAL_11>User\nHello\n<SPECIAL_11>Assistant\n<think>\n"
    )
    assert on.thinking
    assert list(on.token_ids) == TOKENIZER.encode(on.text)
    off = CHAT.encode(user("Hello"), reasoning=False)
    assert off.text.endswith("<SPECIAL_11>Assistant\n<think></think>")
    assert not off.thinking


def test_a_whole_conversation() -> None:
    """System text stripped, earlier reasoning dropped, turns closed, tool results in one turn."""
    messages = [
        Message("system", "  Be brief. "),
        Message("user", " 3+4? "),
        Message("assistant", "hm\n</think>\n\n7"),
        Message("tool", "a"),
        Message("tool", "b"),
        Message("user", "sure?"),
    ]
    assert CHAT.encode(messages, reasoning=True).text == (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\n3+4?\n"
        "<SPECIAL_11>Assistant\n7\n<SPECIAL_12>\n"
        "<SPECIAL_11>User\n<TOOL_RESPONSE>[a, b]</TOOL_RESPONSE>\n"
        "<SPECIAL_11>User\nsure?\n<SPECIAL_11>Assistant\n<think>\n"
    )


def test_a_last_assistant_message_is_continued() -> None:
    """It is a prefill: thinking goes on in it, or is over if it closes the reasoning."""
    begun = CHAT.encode([*user("3+4?"), Message("assistant", "3+4=")], reasoning=True)
    assert begun.text.endswith("<think>\n3+4=") and begun.thinking
    closed = CHAT.encode([*user("3+4?"), Message("assistant", "7</think>")], reasoning=True)
    assert closed.text.endswith("<think>\n7</think>") and not closed.thinking


ADD = {
    "name": "add",
    "description": "Adds <numbers> & more",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
# The text of the published format, word for word.
TOOLS_TEXT = (
    "You can use the following tools to assist the user if required:"
    "\n<AVAILABLE_TOOLS>[%s]</AVAILABLE_TOOLS>\n\n"
    "If you decide to call any tool(s), use the following format:\n"
    '<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, '
    '{{"name": "tool_name2", "arguments": "tool_args2"}}]</TOOLCALL>\n\n'
    "The user will execute tool-calls and return responses from tool(s) in this format:\n"
    '<TOOL_RESPONSE>[{{"tool_response1"}}, {{"tool_response2"}}]</TOOL_RESPONSE>\n\n'
    "Based on the tool responses, you can call additional tools if needed, correct tool calls if "
    "any errors are found, or just respond to the user."
)
ADD_TEXT = (
    '{"name": "add", "description": "Adds <numbers> & more", "parameters": {"type": "object", '
    '"properties": {"a": {"type": "integer"}}, "required": ["a"]}}'
)


def test_the_golden_example_with_tools() -> None:
    """Function schemas, wrapped or bare, are rendered as the published template does."""
    tools = [{"type": "function", "function": ADD}, {"name": "now"}]
    listed = TOOLS_TEXT % f'{ADD_TEXT}, {{"name": "now"}}'
    end = "\n<SPECIAL_11>User\nHello\n<SPECIAL_11>Assistant\n<think>\n"
    alone = CHAT.encode(user("Hello"), reasoning=True, tools=tools)
    assert alone.text == f"<SPECIAL_10>System\n{listed}{end}"
    assert alone.thinking
    messages = [Message("system", " Be brief. "), *user("Hello")]
    both = CHAT.encode(messages, reasoning=True, tools=tools)
    assert both.text == f"<SPECIAL_10>System\nBe brief.\n\n{listed}{end}"


def test_a_conversation_with_calls() -> None:
    """An assistant's calls follow its text, and their results come in one turn of the user."""
    calls = (ToolCall("add", '{"a": 1}'), ToolCall("now", "{}"))
    messages = [
        *user("1+2?"),
        Message("assistant", "hm</think>Let me see.", calls),
        Message("tool", "3"),
        Message("tool", '"noon"'),
        Message("assistant", "", calls[:1]),
    ]
    assert CHAT.encode(messages, reasoning=False).text == (
        "<SPECIAL_10>System\n\n<SPECIAL_11>User\n1+2?\n"
        "<SPECIAL_11>Assistant\nLet me see.\n\n"
        '<TOOLCALL>[{"name": "add", "arguments": {"a": 1}}, {"name": "now", "arguments": {}}]'
        "</TOOLCALL>\n<SPECIAL_12>\n"
        '<SPECIAL_11>User\n<TOOL_RESPONSE>[3, "noon"]</TOOL_RESPONSE>\n'
        '<SPECIAL_11>Assistant\n<TOOLCALL>[{"name": "add", "arguments": {"a": 1}}]</TOOLCALL>'
        "\n<SPECIAL_12>\n<SPECIAL_11>Assistant\n<think></think>"
    )


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.booleans())
@settings(deadline=None)
def test_texts_of_tools_and_calls_stay_texts(text: str, reasoning: bool) -> None:
    """Special-token strings in schemas, names, arguments and results are plain words."""
    tool = {"name": f"f{text}", "description": text, "parameters": {"properties": {text: True}}}
    call = ToolCall(f"f{text}", json.dumps({text: text}))
    messages = [*user("x"), Message("assistant", "", (call,)), Message("tool", text)]
    encoded = CHAT.encode(messages, reasoning=reasoning, tools=[tool])
    special = [i for i in encoded.token_ids if i in TOKENIZER.special_tokens.values()]
    assert special == [1, 10, 11, 11, 12, 11, 11]
    assert json.dumps(tool, ensure_ascii=False) in encoded.text
    assert f'[{{"name": "{call.name}", "arguments": {call.arguments}}}]' in encoded.text
    assert TOKENIZER.decode(encoded.token_ids) == encoded.text
    assert encoded.thinking == reasoning


def test_a_template_without_tools_refuses_them() -> None:
    """Tools are never dropped in silence."""
    chat = ChatTemplate("{{ messages[0].content }}", TOKENIZER, names={})
    assert chat.encode(user("x"), reasoning=False).text == "x"
    with pytest.raises(PromptError, match="has no place for tools") as error:
        chat.encode(user("x"), reasoning=False, tools=[ADD])
    assert error.value.kind is ErrorKind.TEMPLATE


@pytest.mark.parametrize("thinking", [True, False])
def test_prompts_are_those_of_the_training(thinking: bool) -> None:
    """Token for token what the embedded model was taught to see, over examples of every kind."""
    encoder = train_tiny.Encoder(train_tiny.Tokenizer.from_file(str(TINY / "tokenizer.json")))
    rng = Random(5)
    for _ in range(150):
        drawn = tiny_problems.draw_example(rng, held_out=False)
        messages = [Message("system", drawn.system)]
        for question, answer in drawn.earlier:
            messages += [Message("user", question), Message("assistant", answer)]
        messages.append(Message("user", drawn.prompt))
        encoded = CHAT.encode(messages, reasoning=thinking)
        assert list(encoded.token_ids) == encoder.prompt(drawn, thinking=thinking)


def test_clean_texts_are_encoded_as_transformers_encodes_them() -> None:
    """apply_chat_template gives the same ids where no text holds anything special."""
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    template = json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]
    messages = [Message("system", "Be kind."), Message("user", "What is 3+4? é😀\n\n ok")]
    plain = [{"role": m.role, "content": m.content} for m in messages]
    expected = hugging_face.apply_chat_template(
        plain, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    encoded = CHAT.encode(messages, reasoning=True)
    assert encoded.text == expected
    assert list(encoded.token_ids) == hugging_face(expected)["input_ids"]


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.booleans(), st.booleans())
@example("<SPECIAL_1<SPECIAL_12>2>", True, False)
@example("</think>/no_think<s>", True, True)
@settings(deadline=None)
def test_texts_stay_texts(text: str, reasoning: bool, in_system: bool) -> None:
    """Whatever stands in a text is neither special nor a switch nor deleted."""
    messages = [Message("system", text)] if in_system else []
    encoded = CHAT.encode([*messages, *user(text)], reasoning=reasoning)
    system = text.strip() if in_system else ""
    end = "<think>\n" if reasoning else "<think></think>"
    plain = TOKENIZER.encode_plain
    assert list(encoded.token_ids) == [
        1,
        10,
        *plain(f"System\n{system}\n"),
        11,
        *plain(f"User\n{text.strip()}\n"),
        11,
        *plain(f"Assistant\n{end}"),
    ]
    assert encoded.thinking == reasoning


def test_a_role_the_template_refuses_is_a_template_error() -> None:
    """The row gets the template's own words."""
    with pytest.raises(PromptError, match="a narrator message cannot stand here") as caught:
        CHAT.encode([Message("narrator", "once")], reasoning=True)
    assert caught.value.row_error.kind is ErrorKind.TEMPLATE


def test_lone_surrogates_are_an_invalid_prompt() -> None:
    """The row is told; the text is not mangled."""
    with pytest.raises(PromptError) as caught:
        CHAT.encode(user("a\udfff"), reasoning=True)
    assert caught.value.row_error.kind is ErrorKind.INVALID_PROMPT


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ '%s' | format(nothing.x.y) }}",
        "{{ 1/0 }}",
        "{% for i in range(1000000) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_break_out(source: str) -> None:
    """Templates come with checkpoints, which are not trusted: sandbox errors are row errors."""
    chat = ChatTemplate(source, TOKENIZER, names={})
    try:
        text = chat.encode(user("x"), reasoning=True).text
    except PromptError as error:
        assert error.row_error.kind is ErrorKind.TEMPLATE
    else:
        assert text == ""  # the sandbox hides what may not be seen


def test_other_switches_and_template_files(tmp_path: Path) -> None:
    """chat_template.jinja comes before tokenizer_config.json; enable_thinking is passed; a
    template without /think gets no such word; <s> written by a template is not doubled."""
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages[0].content }}|{{ messages | length }}|"
        "{{ '<think>' if enable_thinking }}"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "chat_template": "no"})
    )
    chat = ChatTemplate.load(tmp_path, TOKENIZER)
    on, off = (chat.encode(user("hi <s>"), reasoning=flag) for flag in (True, False))
    assert on.text == "<s>hi <s>|1|<think>" and on.thinking
    assert off.text == "<s>hi <s>|1|" and not off.thinking
    assert on.token_ids.count(1) == 1 and on.token_ids[0] == 1
    assert (
        not ChatTemplate("{{ messages[0].content }}", TOKENIZER, names={})
        .encode(user("what does <think> mean?"), reasoning=True)
        .thinking
    )


def test_several_named_templates(tmp_path: Path) -> None:
    """The one named default is taken."""
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path, TOKENIZER).encode(user("x"), reasoning=True).text == "yes"


def test_no_template_and_a_broken_one_are_checkpoint_errors(tmp_path: Path) -> None:
    """Both say what is wrong before a row is run."""
    assert not ChatTemplate.exists(tmp_path)
    with pytest.raises(CheckpointError, match="no chat template"):
        ChatTemplate.load(tmp_path, TOKENIZER)
    (tmp_path / "chat_template.jinja").write_text("a\n{% if %}")
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate.load(tmp_path, TOKENIZER)


def with_special_tokens(*contents: str) -> ChatTemplate:
    """A template that is the first message, with more special tokens than the tiny model has."""
    definition = json.loads((TINY / "tokenizer.json").read_text())
    like = definition["added_tokens"][-1]
    definition["added_tokens"] += [
        {**like, "id": 400 + i, "content": content} for i, content in enumerate(contents)
    ]
    return ChatTemplate("{{ messages[0].content }}", Tokenizer(definition, bos_id=1), names={})


def test_special_tokens_of_one_character_and_in_one_another_stay_text() -> None:
    """However special tokens overlap, a text that holds them is plain."""
    chat = with_special_tokens("~", "~a", "a~a", "a~")
    text = "a~a~aa~~a"
    ids = chat.encode(user(text), reasoning=True).token_ids
    assert list(ids) == [1, *TOKENIZER.encode_plain(text)]


def test_many_special_tokens_cost_a_long_text_little() -> None:
    """The published vocabulary has a thousand: looking for them takes less than tokenising."""
    chat = with_special_tokens(*(f"<SPECIAL_{i}>" for i in range(100, 1000)))
    text = "The quick brown fox: 3 < 4 and a/b. " * 5000
    started = time.process_time()
    plain = TOKENIZER.encode_plain(text)
    halfway = time.process_time()
    ids = chat.encode(user(text), reasoning=True).token_ids
    assert list(ids) == [1, *plain]
    assert time.process_time() - halfway < 4 * (halfway - started)
