"""What a completion can be bound to: a JSON Schema, a regular expression, or a list of choices.

Here it is only read and looked over; ``engine/constraints.py`` turns it into a grammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from batchrun.wording import dotted, nearest, quoted, shown

Key = tuple[str | int, ...]

MAX_DEPTH = 64
"""Levels of a schema; no sensible one comes near."""


class FormatKind(StrEnum):
    """The values of ``type``."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"

    @property
    def content_key(self) -> str:
        """The key beside ``type``."""
        return {"json_schema": "schema", "regex": "pattern", "choice": "choices"}[self.value]


@dataclass(frozen=True, slots=True)
class Slip:
    """What is wrong with a response format, at which key below it, and how to mend it."""

    key: Key
    message: str
    hint: str

    def __str__(self) -> str:
        place = f"{dotted(self.key)} " if self.key else ""
        return f"{place}{self.message}; {self.hint}"


class FormatError(ValueError):
    """A response format that cannot be used; the text is that of its first slip."""


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """A response format in which nothing is wrong by itself. Equal ones have equal hashes.

    ``text`` is the pattern, or the JSON of the schema or of the choices. The order of a schema's
    properties is kept, as they are written in it.
    """

    kind: FormatKind
    text: str

    @classmethod
    def parse(cls, raw: object) -> ResponseFormat:
        """Read ``{"type": …, "schema" | "pattern" | "choices": …}``.

        :raises FormatError: something is wrong with it.
        """
        for slip in slips(raw):
            raise FormatError(str(slip))
        assert isinstance(raw, Mapping)
        kind = FormatKind(raw["type"])
        content = raw[kind.content_key]
        if kind is FormatKind.REGEX:
            return cls(kind, content)
        return cls(kind, json.dumps(list(content) if kind is FormatKind.CHOICE else content))


def slips(raw: object) -> Iterator[Slip]:
    """Everything that is wrong with a response format and can be known without a tokenizer."""
    kinds = ", ".join(FormatKind)
    if not isinstance(raw, Mapping):
        yield Slip((), f"must be a mapping with the key type, not {shown(raw)}", f"type: {kinds}")
        return
    if "type" not in raw:
        yield Slip(("type",), "is missing", f"give one of {kinds}")
        return
    named = raw["type"]
    if not isinstance(named, str) or named not in tuple(FormatKind):
        close = nearest(named, tuple(FormatKind)) if isinstance(named, str) else None
        hint = f"did you mean {close}?" if close else "see the list"
        yield Slip(("type",), f"must be one of {kinds}, not {shown(named)}", hint)
        return
    kind = FormatKind(named)
    for key in raw:
        if key not in ("type", kind.content_key):
            hint = f"the keys of {kind} are type and {kind.content_key}"
            yield Slip((str(key),), "no such key", hint)
    if kind.content_key not in raw:
        yield Slip((kind.content_key,), "is missing", f"{kind} needs it")
        return
    content = raw[kind.content_key]
    match kind:
        case FormatKind.JSON_SCHEMA:
            yield from _schema_slips(content)
        case FormatKind.REGEX:
            if not isinstance(content, str) or not content or not _is_unicode(content):
                hint = r"for example pattern: '[A-Z]{2}-\d{4}'"
                yield Slip(("pattern",), f"must be a text, not {shown(content)}", hint)
        case FormatKind.CHOICE:
            yield from _choice_slips(content)


def _choice_slips(choices: object) -> Iterator[Slip]:
    if not isinstance(choices, list | tuple) or not choices:
        hint = "for example choices: [yes, no], each in quotes"
        yield Slip(("choices",), f"must be a list of texts, not {shown(choices)}", hint)
        return
    for index, choice in enumerate(choices):
        key = ("choices", index)
        if not isinstance(choice, str) or not choice or not _is_unicode(choice):
            hint = "put it in quotes, or delete it"
            yield Slip(key, f"must be a text that is not empty, not {shown(choice)}", hint)
        elif choice[0].isspace():
            yield Slip(key, f"begins with white space: {quoted(choice)}", "delete the white space")


_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_VALUES = (
    *("type", "const", "enum", "$ref", "required", "minProperties", "maxProperties"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
_NOTES = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$comment", "$schema", "$id"),
)
KEYWORDS = (*_BY_NAME, *_SCHEMAS, *_LISTS, *_VALUES, *_NOTES)
"""The keywords that are honoured, or say nothing about what is valid."""


def _schema_slips(schema: object) -> Iterator[Slip]:
    if not isinstance(schema, dict):
        hint = "for example schema: {type: object, properties: {name: {type: string}}}"
        yield Slip(("schema",), f"must be a mapping, not {shown(schema)}", hint)
        return
    found = False
    for slip in _keyword_slips(schema, ("schema",)):
        found = True
        yield slip
    if found:
        return
    try:
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        yield Slip(("schema",), f"is not JSON: {error}", "write texts, numbers, lists and mappings")
        return
    if not _Finiteness(schema).ends:
        hint = (
            "look for a required property that is not allowed, or that asks for itself without end"
        )
        yield Slip(("schema",), "has no value that is valid and finite", hint)


def _keyword_slips(schema: object, key: Key) -> Iterator[Slip]:
    """Keywords that would not be honoured: they would be ignored in silence."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield Slip(key, f"must be a schema, that is a mapping, not {shown(schema)}", "see the name")
        return
    if len(key) > MAX_DEPTH:
        yield Slip(key, f"is nested deeper than {MAX_DEPTH} levels", "use $defs and $ref")
        return
    for word, value in schema.items():
        inner = (*key, word)
        if word not in KEYWORDS:
            close = nearest(word, KEYWORDS) if isinstance(word, str) else None
            hint = f"did you mean {close}?" if close else "delete it, or say it in other keywords"
            yield Slip((*key, str(word)), "is not a keyword that can be honoured", hint)
        elif word in _SCHEMAS:
            yield from _keyword_slips(value, inner)
        elif word in _LISTS:
            if isinstance(value, list):
                for index, item in enumerate(value):
                    yield from _keyword_slips(item, (*inner, index))
            else:
                yield Slip(inner, f"must be a list of schemas, not {shown(value)}", "write a list")
        elif word in _BY_NAME:
            if isinstance(value, dict):
                for name, item in value.items():
                    if isinstance(name, str):
                        yield from _keyword_slips(item, (*inner, name))
                    else:
                        yield Slip((*inner, str(name)), "is a name that is no text", "quote it")
            else:
                hint = "write name: schema"
                yield Slip(inner, f"must be a mapping of schemas, not {shown(value)}", hint)
        elif word == "$ref" and not (value == "#" or str(value).startswith("#/")):
            hint = 'write for example "#/$defs/name"'
            yield Slip(inner, f"must point into this schema, not to {shown(value)}", hint)
    yield from _min_properties_slips(schema, key)


def _min_properties_slips(schema: Mapping[str, Any], key: Key) -> Iterator[Slip]:
    """A grammar does not know which names it wrote, so it cannot count distinct ones."""
    least, required = schema.get("minProperties", 0), schema.get("required", ())
    is_open = schema.get("additionalProperties") is not False or "patternProperties" in schema
    if isinstance(least, int) and isinstance(required, list | tuple) and is_open:
        if least > len(required):
            message = "cannot be honoured where properties of any name are allowed"
            hint = "name the properties as required, or set additionalProperties: false"
            yield Slip((*key, "minProperties"), message, hint)


class _Finiteness:
    """Whether some finite value can be valid: a schema can ask for itself inside itself.

    Which ``$ref`` targets are finite is the least fixed point; all else follows from them.
    What is contradictory in other ways is left to the grammar's compiler.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._finite: set[str] = set()
        pointers = set(_refs(root))
        grows = True
        while grows:
            new = {p for p in pointers - self._finite if self._has_value(self._target(p))}
            self._finite |= new
            grows = bool(new)
        self.ends = self._has_value(root)

    def _target(self, pointer: str) -> object:
        value: object = self._root
        for part in pointer.removeprefix("#").split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, dict):
                value = value.get(part, True)
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                return True  # the compiler says that it is not there
        return value

    def _has_value(self, schema: object) -> bool:
        if not isinstance(schema, dict):
            return schema is not False
        if "$ref" in schema and schema["$ref"] not in self._finite:
            return False
        if not all(self._has_value(item) for item in schema.get("allOf", ())):
            return False
        for word in ("anyOf", "oneOf"):
            if word in schema and not any(self._has_value(item) for item in schema[word]):
                return False
        if "enum" in schema or "const" in schema:
            return True
        types = schema.get("type", ("null",))
        types = (types,) if isinstance(types, str) else types
        return any(self._has_value_of(schema, kind) for kind in types)

    def _has_value_of(self, schema: dict[str, Any], kind: object) -> bool:
        if kind == "object":
            properties = schema.get("properties", {})
            rest = schema.get("additionalProperties", True)
            required = schema.get("required", ())
            return all(self._has_value(properties.get(name, rest)) for name in required)
        if kind == "array":
            least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
            if not isinstance(least, int):
                return True
            needed = [*first[:least], *([schema.get("items", True)] if least > len(first) else [])]
            return all(map(self._has_value, needed))
        return True


def _refs(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(pointer := value.get("$ref"), str):
            yield pointer
        for item in value.values():
            yield from _refs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _refs(item)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
