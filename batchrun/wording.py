"""How messages name keys and values, and what a value should have been."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from batchrun.logs import printable, redact

# Bounds that stand for "what an integer column holds" are no news to a person.
_HUGE = 2**31 - 1


def dotted(key: Iterable[str | int]) -> str:
    """The key path as messages write it: ``input.columns[1]``."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + part
    return printable(text)


def nearest(word: str, words: Iterable[str]) -> str:
    """The closest of ``words``, or an empty text when none is close."""
    close = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.6)
    return close[0] if close else ""


def shown(value: object) -> str:
    """A value of the job file as a message shows it: short, with its type, without secrets."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case str():
            return f"the text {quoted(value)}"
        case Mapping():
            return "a mapping"
        case Sequence():
            return "a list" if value else "an empty list"
        case _:
            return f"a value of type {type(value).__name__}"


def quoted(text: str, limit: int = 60) -> str:
    """``'text'`` as a message shows it: without secrets and control characters, cut if long."""
    safe = printable(redact(text))
    return f"'{safe[:limit]}…'" if len(safe) > limit else f"'{safe}'"


def duration(seconds: float) -> str:
    """``2.5 s``, ``41 s``, ``12 min 5 s``, ``3 h 20 min``, ``2 d 4 h``."""
    whole = round(seconds)
    for unit, next_unit, size, next_size in (
        ("d", "h", 86400, 3600),
        ("h", "min", 3600, 60),
        ("min", "s", 60, 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // next_size} {next_unit}"
    return f"{round(seconds, 1):g} s" if seconds < 10 else f"{whole} s"


def join_or(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" or {words[-1]}"


def expectation(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema asks of a value, in words: ``a whole number of at least 1, or null``."""
    match schema:
        case {"anyOf": list() as options}:
            return join_or([expectation(option) for option in options])
        case {"const": value}:
            return str(value)
        case {"enum": list() as values}:
            return join_or([str(value) for value in values])
        case {"type": "integer" | "number" as kind}:
            return _number(schema, "whole number" if kind == "integer" else "number")
        case {"type": "string"}:
            return "a text that is not empty" if "minLength" in schema else "a text"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "null"}:
            return "null"
        case {"type": "array"}:
            items = schema.get("items", {})
            of = {"string": " of texts", "object": " of mappings"}.get(items.get("type", ""), "")
            return f"a list{of}"
        case _:
            return "a mapping"


def _number(schema: Mapping[str, Any], noun: str) -> str:
    bounds = []
    if (least := schema.get("minimum")) is not None and least > -_HUGE:
        bounds.append(f"at least {least:g}")
    if (above := schema.get("exclusiveMinimum")) is not None:
        bounds.append(f"above {above:g}")
    if (most := schema.get("maximum")) is not None and most < _HUGE:
        bounds.append(f"at most {most:g}")
    if (below := schema.get("exclusiveMaximum")) is not None and below < _HUGE:
        bounds.append(f"below {below:g}")
    if not bounds:
        return f"a {noun}"
    of = "of " if bounds[0].startswith("at") else ""
    return f"a {noun} {of}" + " and ".join(bounds)
