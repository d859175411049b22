"""Which Arrow types are text, and what two files' types of one column become together."""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa


def is_string(kind: pa.DataType) -> bool:
    """Whether values of ``kind`` are text: string, large_string, string_view, or a dictionary."""
    if pa.types.is_dictionary(kind):
        return is_string(kind.value_type)
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def answer_kind(kind: pa.DataType) -> Literal["text", "number", "switch"] | None:
    """What expected answers of this type are, in lists too; None for what cannot be one."""
    if pa.types.is_dictionary(kind):
        return answer_kind(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return answer_kind(kind.value_type)
    if is_string(kind) or pa.types.is_null(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "switch"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return None


def is_conversation(kind: pa.DataType) -> bool:
    """Whether values of ``kind`` are lists of structs with text fields role and content."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not (is_list or pa.types.is_fixed_size_list(kind)):
        return False
    item = kind.value_type
    if not pa.types.is_struct(item):
        return False
    fields = {item.field(index).name: item.field(index).type for index in range(item.num_fields)}
    return all(
        name in fields and (is_string(fields[name]) or pa.types.is_null(fields[name]))
        for name in ("role", "content")
    )


def unify(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The narrowest type that holds the values of both, or None where there is none.

    Equal types stay as they are. Otherwise dictionaries count as their values and string views
    as strings, integers and floats widen, and null goes with everything.
    """
    if first.equals(second):
        return first
    if pa.types.is_null(first):
        return second
    if pa.types.is_null(second):
        return first
    fields = [pa.schema([("value", _plain(kind))]) for kind in (first, second)]
    try:
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    return kind


def as_bytes(kind: pa.DataType) -> pa.DataType:
    """``kind`` with text replaced by bytes at every depth: its values can always be read."""
    if pa.types.is_dictionary(kind):
        return as_bytes(kind.value_type)
    if is_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([field.with_type(as_bytes(field.type)) for field in fields])
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(as_bytes(kind.value_type)))
    if pa.types.is_map(kind):
        return pa.map_(as_bytes(kind.key_type), as_bytes(kind.item_type))
    return kind


def decode(value: Any, kind: pa.DataType, *, errors: str = "strict") -> Any:
    """A Python value read as ``as_bytes(kind)``, with text decoded as ``kind`` says.

    Raises UnicodeDecodeError for text that is not UTF-8, unless ``errors`` is ``replace``.
    """
    if value is None:
        return None
    if pa.types.is_dictionary(kind):
        return decode(value, kind.value_type, errors=errors)
    if is_string(kind):
        return value.decode("utf-8", errors) if isinstance(value, bytes) else value
    if pa.types.is_struct(kind):
        return {
            kind.field(index).name: decode(
                value[kind.field(index).name], kind.field(index).type, errors=errors
            )
            for index in range(kind.num_fields)
        }
    if pa.types.is_map(kind):
        return [
            (decode(key, kind.key_type, errors=errors), decode(item, kind.item_type, errors=errors))
            for key, item in value
        ]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [decode(item, kind.value_type, errors=errors) for item in value]
    return value


def convert(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column as ``kind``; raises ArrowInvalid for a value that ``kind`` cannot hold."""
    if column.type.equals(kind):
        return column
    try:
        return column.cast(kind)
    except pa.ArrowNotImplementedError:
        return pa.array(column.to_pylist(), type=kind)


def repeat(column: pa.ChunkedArray, times: int) -> pa.ChunkedArray:
    """The column with every value so many times in a row."""
    if times == 1:
        return column
    places = [place for place in range(len(column)) for _ in range(times)]
    try:
        return column.take(places)
    except pa.ArrowNotImplementedError:  # string views, at any depth
        values = column.to_pylist()
        return pa.chunked_array([pa.array([values[place] for place in places], column.type)])


def is_valid(column: pa.Array) -> bool:
    """Whether all text in the column is UTF-8 and its buffers are sound."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    # A dictionary's check looks at its indices only.
    return not pa.types.is_dictionary(column.type) or is_valid(column.dictionary)


def with_valid_text(column: pa.Array) -> pa.Array:
    """The column, with every byte sequence that is not UTF-8 replaced by U+FFFD in its text."""
    if is_valid(column):
        return column
    values = column.cast(as_bytes(column.type)).to_pylist()
    fixed = [decode(value, column.type, errors="replace") for value in values]
    return pa.array(fixed, type=column.type)
