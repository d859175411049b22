"""Conversations to token ids, by the checkpoint's own chat template.

Texts of rows are data: whatever stands in them, none of it becomes a special token, switches the
reasoning or is deleted by the template. So before rendering, every substring that the template or
the tokenizer would act on is broken by a lone surrogate, which no Unicode text can hold;
afterwards the text is split at the template's own special tokens, the surrogates are taken out
again, and what lies between is encoded as plain text.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchrun.engine.tokenizer import Tokenizer, read_json
from batchrun.errors import BatchrunError, CheckpointError
from batchrun.records import ErrorKind, Message, RowError
from batchrun.tools import Tool, as_functions

_SWITCH_ON, _SWITCH_OFF = "/think", "/no_think"
_OPEN, _CLOSE = "<think>", "</think>"
_SHIELD = "\udfff"


class PromptError(BatchrunError):
    """A row's conversation cannot be made a prompt; :attr:`row_error` is for its output."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.TEMPLATE) -> None:
        super().__init__(message)
        self.args = (message, kind)
        self.kind = kind

    @property
    def row_error(self) -> RowError:
        """The error as a value."""
        return RowError(self.kind, self.message)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A rendered conversation. ``thinking`` says that it leaves ``<think>`` open."""

    token_ids: tuple[int, ...]
    thinking: bool
    text: str


class ChatTemplate:
    """A checkpoint's chat template, compiled once, in a sandbox."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, names: Mapping[str, str]) -> None:
        """``names`` are the variables ``bos_token`` and the like that templates may use.

        :raises CheckpointError: the template has a syntax error.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template has a syntax error in its line {error.lineno}: {error.message}",
                "copy tokenizer_config.json from where the model came",
            ) from error
        self._tokenizer = tokenizer
        self._names = dict(names)
        self._has_switch = _SWITCH_OFF in source
        self._takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        marks = [mark for mark in tokenizer.special_tokens if mark]
        self._marks = _any_of(marks)
        self._acted_on = _starts_of(marks)
        self._acted_on_or_tags = _starts_of([*marks, _SWITCH_ON, _SWITCH_OFF, _OPEN])

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a checkpoint folder has a chat template."""
        return _find_template(folder, _tokenizer_config(folder)) is not None

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """Read ``chat_template.jinja``, else the template in ``tokenizer_config.json``.

        :raises CheckpointError: there is none, or it has a syntax error.
        """
        config = _tokenizer_config(folder)
        source = _find_template(folder, config)
        if source is None:
            raise CheckpointError(
                f"{folder}: the checkpoint has no chat template",
                "copy chat_template.jinja or tokenizer_config.json from where the model came",
            )
        names = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[name] = value
        return cls(source, tokenizer, names=names)

    def encode(
        self, messages: Sequence[Message], *, reasoning: bool, tools: Sequence[Tool] = ()
    ) -> EncodedPrompt:
        """Render and encode a conversation; ``reasoning`` wins over any word in it.

        ``tools`` are valid function schemas (:func:`batchrun.tools.tool_problems` finds none).

        :raises PromptError: the template refuses the conversation or has no place for tools (kind
            template), or a text is no Unicode (kind invalid_prompt).
        """
        if tools and not self._takes_tools:
            raise PromptError("the checkpoint's chat template has no place for tools")
        for message in messages:
            calls = [text for call in message.tool_calls for text in (call.name, call.arguments)]
            try:
                "".join([message.content, *calls]).encode()
            except UnicodeEncodeError as error:
                raise PromptError(
                    f"the {message.role} text holds lone surrogates, so it is not Unicode",
                    ErrorKind.INVALID_PROMPT,
                ) from error
        rendered = self._render(self._shielded(messages, reasoning), reasoning, tools)
        ids: list[int] = []
        last = 0
        for mark in self._marks.finditer(rendered):
            ids += self._encode_plain(rendered[last : mark.start()])
            ids.append(self._tokenizer.special_tokens[mark.group()])
            last = mark.end()
        ids += self._encode_plain(rendered[last:])
        bos_id = self._tokenizer.bos_id
        if bos_id is not None and ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
        is_open = rendered.rfind(_OPEN, last) > rendered.rfind(_CLOSE, last)
        return EncodedPrompt(tuple(ids), reasoning and is_open, rendered.replace(_SHIELD, ""))

    def _shielded(self, messages: Sequence[Message], reasoning: bool) -> list[dict[str, Any]]:
        """The messages as the template gets them, the switch as a word of the system message."""
        out: list[dict[str, Any]] = []
        for message in messages:
            # What an assistant said may hold the reasoning that the template cuts off, and as the
            # last message it may close the reasoning that it continues.
            is_model = message.role == "assistant"
            pattern = self._acted_on if is_model else self._acted_on_or_tags
            content = pattern.sub(lambda m: m.group() + _SHIELD, message.content)
            out.append({"role": message.role, "content": content})
            if message.tool_calls:
                calls = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
                out[-1]["tool_calls"] = [
                    {"type": "function", "function": self._shielded_json(call)} for call in calls
                ]
        if self._has_switch:
            if not out or out[0]["role"] != "system":
                out.insert(0, {"role": "system", "content": ""})
            out[0]["content"] += _SWITCH_ON if reasoning else _SWITCH_OFF
        return out

    def _shielded_json(self, value: object) -> object:
        """A JSON value with every text in it, keys too, made plain for the tokenizer."""
        match value:
            case str():
                return self._acted_on.sub(lambda m: m.group() + _SHIELD, value)
            case Mapping():
                return {self._shielded_json(k): self._shielded_json(v) for k, v in value.items()}
            case list() | tuple():
                return [self._shielded_json(item) for item in value]
            case _:
                return value

    def _render(
        self, messages: list[dict[str, Any]], reasoning: bool, tools: Sequence[Tool]
    ) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=self._shielded_json(as_functions(tools)) if tools else None,
                add_generation_prompt=True,
                enable_thinking=reasoning,
                **self._names,
            )
        except PromptError:
            raise
        except Exception as error:  # a template may fail in any way; the row is told, not the run
            raise PromptError(
                f"the chat template failed: {type(error).__name__}: {error}"
            ) from error

    def _encode_plain(self, text: str) -> list[int]:
        return self._tokenizer.encode_plain(text.replace(_SHIELD, "")) if text else []


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error}", "copy the file again"
            ) from error
    value = config.get("chat_template")
    if isinstance(value, list):  # several templates by name
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Any of the words, the longest first as the tokenizer finds them."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _starts_of(words: Iterable[str]) -> re.Pattern[str]:
    """The first character of any of the words; by lookahead, so that none overlapping is missed.

    First characters stand outside, so that a search skips to where one of a thousand words may be.
    """
    rests: dict[str, list[str]] = defaultdict(list)
    for word in words:
        rests[word[0]].append(re.escape(word[1:]))
    starts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
    return re.compile("|".join(starts) or r"(?!)")


def _tojson(value: object, indent: int | None = None) -> str:
    """JSON as chat templates expect it: Unicode as it is and nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse a conversation."""
    raise PromptError(f"the chat template refuses the conversation: {message}")
