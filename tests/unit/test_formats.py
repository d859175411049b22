"""Response formats are read before anything runs, and every slip is said with its place."""

from __future__ import annotations

from typing import Any

import pytest

from batchrun.formats import FormatError, FormatKind, ResponseFormat, slips


def schema(**keywords: object) -> dict[str, object]:
    """A response format with this schema."""
    return {"type": "json_schema", "schema": keywords}


def test_a_format_is_hashable_and_keeps_the_order_of_properties() -> None:
    """Equal formats are one; the order in which properties are written makes another."""
    one = ResponseFormat.parse(schema(type="object", properties={"a": {}, "b": {}}))
    same = ResponseFormat.parse(schema(type="object", properties={"a": {}, "b": {}}))
    other = ResponseFormat.parse(schema(type="object", properties={"b": {}, "a": {}}))
    assert len({one, same, other}) == 2
    assert one.kind is FormatKind.JSON_SCHEMA
    choice = ResponseFormat.parse({"type": "choice", "choices": ("yes", "nö")})
    assert choice == ResponseFormat(FormatKind.CHOICE, '["yes", "n\\u00f6"]')
    regex = ResponseFormat.parse({"type": "regex", "pattern": "a|b"})
    assert regex == ResponseFormat(FormatKind.REGEX, "a|b")


deep: dict[str, Any] = {}
for _ in range(40):
    deep = {"items": deep, "type": "array"}
endless: dict[str, Any] = {"type": "array"}
endless["items"] = endless


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("json", "must be a mapping with the key type, not the text 'json'"),
        ({}, "type is missing; give one of json_schema, regex, choice"),
        ({"type": "json_shema"}, "did you mean json_schema?"),
        ({"type": None, "schema": {}}, "type must be one of json_schema, regex, choice, not null"),
        ({"type": "regex", "schema": {}}, "schema no such key; the keys of regex are type and p"),
        ({"type": "regex"}, "pattern is missing; regex needs it"),
        ({"type": "regex", "pattern": ""}, "pattern must be a text, not the text ''"),
        ({"type": "regex", "pattern": "\ud800"}, "pattern must be a text"),
        ({"type": "choice", "choices": []}, "choices must be a list of texts, not an empty list"),
        ({"type": "choice", "choices": "yes"}, "choices must be a list of texts, not the text"),
        ({"type": "choice", "choices": ["a", 1]}, "choices[1] must be a text that is not empty"),
        ({"type": "choice", "choices": ["a", ""]}, "choices[1] must be a text that is not empty"),
        ({"type": "choice", "choices": [" a"]}, "choices[0] begins with white space"),
        ({"type": "json_schema", "schema": "{}"}, "schema must be a mapping"),
        (schema(propertis={}), "schema.propertis is not a keyword that can be honoured; did you"),
        (schema(uniqueItems=True), "schema.uniqueItems is not a keyword that can be honoured"),
        (
            schema(properties={"a": {"items": {"not": {}}}}),
            "schema.properties.a.items.not is not a keyword",
        ),
        (schema(anyOf=[{}, {"if": {}}]), "schema.anyOf[1].if is not a keyword"),
        (schema(**{"x-guidance": {"lenient": True}}), "schema.x-guidance is not a keyword"),
        (schema(**{"$ref": "http://a/b"}), "schema.$ref must point into this schema"),
        (schema(properties=["a"]), "schema.properties must be a mapping of schemas, not a list"),
        (schema(anyOf={}), "schema.anyOf must be a list of schemas, not a mapping"),
        (schema(items=3), "schema.items must be a schema, that is a mapping, not 3"),
        (schema(type="object", minProperties=1), "schema.minProperties cannot be honoured where"),
        (schema(const=float("nan")), "schema is not JSON"),
        (schema(const="\ud800"), "schema is not JSON"),
        ({"type": "json_schema", "schema": endless}, "is nested deeper than 64 levels"),
    ],
)
def test_slips(raw: object, said: str) -> None:
    """What cannot be read or honoured is refused with its key and a way to mend it."""
    found = [str(slip) for slip in slips(raw)]
    assert any(said in text for text in found), found
    with pytest.raises(FormatError):
        ResponseFormat.parse(raw)


def test_every_slip_at_once() -> None:
    """One look shows all unknown keywords, not the first."""
    raw = schema(foo=1, properties={"a": {"bar": 1}}, anyOf=[{"baz": 1}])
    assert [slip.key[-1] for slip in slips(raw)] == ["foo", "bar", "baz"]


@pytest.mark.parametrize(
    "keywords",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "required": ["a"], "additionalProperties": False},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2},
        {"allOf": [{}, {"$ref": "#"}]},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
        },
    ],
)
def test_a_schema_without_an_end_is_refused(keywords: dict[str, object]) -> None:
    """A schema that every value would have to hold itself to satisfy is a contradiction."""
    assert [slip.message for slip in slips(schema(**keywords))] == [
        "has no value that is valid and finite"
    ]


@pytest.mark.parametrize(
    "keywords",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": ["null", "object"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "null"}]},
        {"type": "object", "required": ["a"], "properties": {"$ref": {"type": "string"}}},
        {"$ref": "#/$defs/a%20b", "$defs": {"a b": {}}},
        {"enum": [{"not": 1, "$ref": "#/nowhere"}]},
        deep,
    ],
)
def test_a_schema_with_an_end_is_accepted(keywords: dict[str, object]) -> None:
    """Recursion that can end is fine, and data inside a schema is no schema."""
    assert list(slips(schema(**keywords))) == []
