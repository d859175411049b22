"""Functions that a model may call: their schemas, and the calls in what it says. Pure.

A model of the family writes its calls as plain text, ``<TOOLCALL>[{"name": …, "arguments": …},
…]</TOOLCALL>``, once or several times, among other text or alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from batchrun.records import ToolCall

OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"

Tool = Mapping[str, Any]
"""A function schema: ``{type: function, function: {name, description, parameters}}`` or the
function alone."""

_NAME = re.compile(r"[^\s\"'\\\x00-\x1f\x7f]{1,256}")
_DECODER = json.JSONDecoder(strict=False)  # a line break inside a text is forgiven


@dataclass(frozen=True, slots=True)
class ToolProblem:
    """What is wrong with a tool: at which key below the list of tools, and how to mend it."""

    key: tuple[str | int, ...]
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Reply:
    """A completion, its calls apart. ``calls`` is None where there are none."""

    text: str
    calls: tuple[ToolCall, ...] | None


def parse_calls(completion: str) -> Reply:
    """Take the calls out of a completion; what stands around them stays, to the character.

    Where only white space is left, the text is empty. All or nothing: if any block is malformed
    (no JSON list of calls, no end, an empty list), the completion stays as it is, without calls,
    and :func:`is_malformed` is true of it. A call needs a ``name`` and ``arguments``, a JSON
    object or a text; whether there is such a function is not asked.
    """
    calls: list[ToolCall] = []
    around: list[str] = []
    last = 0
    while (start := completion.find(OPEN, last)) >= 0:
        found = _block(completion, start + len(OPEN))
        if found is None:
            return Reply(completion, None)
        around.append(completion[last:start])
        calls += found[0]
        last = found[1]
    if not calls:
        return Reply(completion, None)
    text = "".join([*around, completion[last:]])
    return Reply(text if text.strip() else "", tuple(calls))


def is_malformed(completion: str | None, calls: Sequence[ToolCall] | None) -> bool:
    """Whether a sample, after :func:`parse_calls`, began a call that is none."""
    return calls is None and completion is not None and OPEN in completion


def as_call(value: object) -> ToolCall:
    """A call from ``{name, arguments}``, also below a key ``function`` as OpenAI has it.

    Arguments that are an object become JSON; a text is kept as it is.

    :raises ValueError: it is no call; the text says why and holds nothing of it.
    """
    inner = value.get("function") if isinstance(value, Mapping) else None
    call = inner if isinstance(inner, Mapping) else value
    if not isinstance(call, Mapping):
        raise ValueError("a call is no mapping with name and arguments")
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not _is_unicode(name) or not _NAME.fullmatch(name):
        raise ValueError("a call has no name that a function can have")
    if isinstance(arguments, Mapping):
        arguments = _to_json(arguments)
    if not isinstance(arguments, str):
        raise ValueError("a call's arguments are neither an object nor a text")
    if not _is_unicode(arguments):
        raise ValueError("a call's arguments hold lone surrogates, so they are not Unicode")
    return ToolCall(name, arguments)


def as_functions(tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """Valid tools in the one shape that chat templates know: ``{type, function}``."""
    return tuple({"type": "function", "function": _function(tool)[0]} for tool in tools)


def tool_problems(tools: Sequence[object]) -> Iterator[ToolProblem]:
    """Everything that is wrong with function schemas; keys begin with the tool's place."""
    seen: dict[str, int] = {}
    for place, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            yield ToolProblem((place,), "is no function schema", "give it name and parameters")
            continue
        function, inner = _function(tool)
        if not isinstance(function, Mapping):
            hint = "write function: {name: …, description: …, parameters: …}"
            yield ToolProblem((place, "function"), "is missing or no mapping", hint)
            continue
        key: tuple[str | int, ...] = (place, *inner)
        if inner and tool.get("type", "function") != "function":
            message = "is not function, the only type of tool"
            yield ToolProblem((place, "type"), message, "write type: function")
        try:
            if not _is_unicode(json.dumps(function, ensure_ascii=False, allow_nan=False)):
                raise ValueError("it holds lone surrogates, which are not Unicode")
        except (TypeError, ValueError, RecursionError) as error:
            yield ToolProblem(key, f"cannot be written as JSON: {error}", "mend or quote it")
        name = function.get("name")
        if name is None:
            yield ToolProblem(key, "has no name", "add name:")
        elif not isinstance(name, str) or not _NAME.fullmatch(name):
            hint = "write for example name: get_weather"
            message = "is no name: a text without white space and quotes is"
            yield ToolProblem((*key, "name"), message, hint)
        elif name in seen:
            message = f"is the name of tool {seen[name]} already (they are counted from 0)"
            yield ToolProblem((*key, "name"), message, "rename or delete one of them")
        else:
            seen[name] = place
        if not isinstance(function.get("description") or "", str):
            yield ToolProblem((*key, "description"), "is not a text", "write it in quotes")
        for below, message, hint in _parameter_problems(function.get("parameters")):
            yield ToolProblem((*key, "parameters", *below), message, hint)


def _parameter_problems(
    parameters: object,
) -> Iterator[tuple[tuple[str | int, ...], str, str]]:
    if parameters is None:
        return  # a function that takes nothing
    if not isinstance(parameters, Mapping):
        hint = "write {type: object, properties: {…}}"
        yield (), "is no JSON schema of an object", hint
        return
    if parameters.get("type") != "object":
        message = "must be object: arguments are always named"
        yield ("type",) if "type" in parameters else (), message, "write type: object"
    properties = parameters.get("properties")
    if properties is not None and not isinstance(properties, Mapping):
        yield (
            ("properties",),
            "has properties that are no mapping of names to schemas",
            "write {city: {type: string}}",
        )
    elif properties is not None:
        for name, schema in properties.items():
            if not isinstance(schema, Mapping | bool):
                message = "describes an argument that is no JSON schema"
                yield ("properties", str(name)), message, f"write {name}: {{type: string}}"
    required = parameters.get("required")
    is_list = isinstance(required, Sequence) and not isinstance(required, str)
    if required is not None and not (is_list and all(isinstance(item, str) for item in required)):
        yield ("required",), "is no list of names", "write required: [city]"


def _function(tool: Tool) -> tuple[Any, tuple[str, ...]]:
    """The function of a tool, and the keys that lead to it."""
    is_wrapped = "function" in tool or (tool.get("type") == "function" and "name" not in tool)
    return (tool.get("function"), ("function",)) if is_wrapped else (tool, ())


def _block(text: str, start: int) -> tuple[list[ToolCall], int] | None:
    """The calls of the block whose JSON begins at ``start``, and where the block ends.

    The JSON is read to its own end, so texts in it may hold the closing tag.
    """
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        value, end = _DECODER.raw_decode(text, start)
        if not isinstance(value, list) or not value:
            return None
        calls = [as_call(item) for item in value]
    except (ValueError, RecursionError):
        return None
    while end < len(text) and text[end].isspace():
        end += 1
    return (calls, end + len(CLOSE)) if text.startswith(CLOSE, end) else None


def _to_json(value: object) -> str:
    """JSON in plain Unicode; what is no Unicode stays escaped.

    :raises ValueError: a value that JSON has not.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return text if _is_unicode(text) else json.dumps(value, allow_nan=False)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
