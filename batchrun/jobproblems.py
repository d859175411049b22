"""From a place where the job's schema does not hold to a message that a person can act on.

Works on the JSON Schema alone, so that what a key may be is said in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchrun.jobfile import KeyPath
from batchrun.wording import expectation, nearest, quoted, shown


def explain(
    key: KeyPath, kind: str, raw: Mapping[str, Any], schema: Mapping[str, Any]
) -> tuple[str, str]:
    """What is wrong with the value at ``key`` of ``raw``, and how to mend it.

    ``kind`` is ``missing``, ``extra_forbidden`` or anything else for a value that cannot be;
    ``schema`` is that of the whole job.
    """
    if kind == "extra_forbidden":
        return "no such key", _similar_key(key, schema)
    part = schema_of(key, schema)
    expected = expectation(part)
    if kind == "missing":
        return "is missing", _describe(str(key[-1]), part)
    value: Any = raw
    for step in key:
        value = value[step]
    return f"must be {expected}, not {shown(value)}", _mend(key, value, part)


def _describe(name: str, part: Mapping[str, Any]) -> str:
    """What to give for a key that is missing."""
    if "properties" in part:
        required = " and ".join(part.get("required", ()))
        return f"add a section `{name}:` with {required}" if required else f"add `{name}:`"
    text = part.get("description", "")
    return f"give it: {text[:1].lower()}{text[1:].rstrip('.')}" if text else "give it"


def _mend(key: KeyPath, value: object, schema: Mapping[str, Any]) -> str:
    name = str(key[-1])
    options = schema.get("anyOf", [schema])
    kinds = {option.get("type") for option in options}
    if isinstance(value, str):
        words = [str(w) for o in options for w in (*o.get("enum", ()), o.get("const", ())) if w]
        if close := nearest(value, words):
            return f"did you mean {close}?"
        if kinds & {"integer", "number"} and value.strip().lstrip("+-").replace(".", "").isdigit():
            return f"write {value.strip()} without quotes"
        if "boolean" in kinds and value.lower() in ("true", "false"):
            return f"write {value.lower()} without quotes"
        if "array" in kinds:
            return f"write a list: {name}: [{quoted(value)[1:-1]}]"
    if isinstance(value, bool | int | float) and "string" in kinds:
        at = "" if isinstance(key[-1], int) else f"{name}: "
        return f'write it in quotes: {at}"{shown(value)}"'
    if "properties" in schema:
        return f"put its keys below it, indented: {', '.join(list(schema['properties'])[:3])}, …"
    if schema.get("default") is not None:
        default = schema["default"]
        return f"the default is {default if isinstance(default, str) else shown(default)}"
    return "delete the key for the default" if "default" in schema else "mend the value"


def _similar_key(key: KeyPath, schema: Mapping[str, Any]) -> str:
    name = str(key[-1])
    part = schema_of(key[:-1], schema)
    options = [_resolved(option, schema["$defs"]) for option in (part, *part.get("anyOf", ()))]
    siblings = [name for option in options for name in option.get("properties", ())]
    if close := nearest(name, siblings):
        return f"did you mean {close}?"
    sections = schema["properties"]
    for section in sections:
        if name in schema_of((section,), schema).get("properties", {}):
            return f"did you mean {section}.{name}?"
    if close := nearest(name, sections):
        return f"did you mean {close}, at the left margin?"
    return f"delete it; the keys here are {', '.join(siblings)}"


def schema_of(key: KeyPath, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the job's JSON Schema that describes ``key``; empty below free mappings."""
    definitions = schema["$defs"]
    part: dict[str, Any] = dict(schema)
    for step in key:
        candidates = [part, *part.get("anyOf", ())]
        part = {}
        for candidate in candidates:
            candidate = _resolved(candidate, definitions)
            if isinstance(step, int) and "items" in candidate:
                part = candidate["items"]
            elif isinstance(step, str) and step in candidate.get("properties", {}):
                part = candidate["properties"][step]
        part = _resolved(part, definitions)
    return part


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return {**definitions[name], **schema} if name else schema


def repair(raw: dict[str, Any], key: KeyPath) -> None:
    """Take the wrong value at ``key`` out of ``raw``, so that its default stands in for it.

    Below ``section.key`` the whole value goes. A path that the schema requires gets a stand-in.
    """
    section = raw.get(str(key[0])) if key else None
    # An optional section that has required keys means nothing without them: it goes as a whole.
    if len(key) > 1 and isinstance(section, dict) and key[0] != "evaluate":
        section.pop(key[1], None)
    elif key:
        raw.pop(str(key[0]), None)
    else:
        raw.clear()
    for name in ("model", "input", "output"):
        if key in ((), (name,)) or key[:2] == (name, "path"):
            raw.setdefault(name, {})["path"] = "?"
