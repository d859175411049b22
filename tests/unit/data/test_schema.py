"""Which columns can be used, and how the types of many files become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchrun.data.inputs import InputColumns, InputSchema, list_input
from batchrun.data.types import (
    answer_kind,
    as_bytes,
    decode,
    is_conversation,
    is_string,
    unify,
    with_valid_text,
)
from batchrun.errors import InputError
from tests.unit.data.parquet import invalid_utf8, prompts, write

DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def checked(folder: Path, columns: InputColumns, **options: Any) -> list[str]:
    """Every problem of the input as text."""
    return [str(item) for item in InputSchema.check(list_input(str(folder)), columns, **options)[1]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), DICTIONARY])
def test_text_of_every_kind_is_a_prompt(tmp_path: Path, kind: pa.DataType) -> None:
    """string, large_string, string_view and dictionaries of them are text."""
    write(tmp_path / "a.parquet", {"prompt": pa.array(["x", None]).cast(kind)})
    assert checked(tmp_path, InputColumns(prompt="prompt", id="prompt")) == []
    assert is_string(kind)


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.bool_(), pa.binary(), pa.date32()])
def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path, kind: pa.DataType) -> None:
    """The column, its type and the way out are named."""
    write(tmp_path / "a.parquet", {"prompt": pa.array([None], kind)})
    (problem,) = checked(tmp_path, InputColumns(prompt="prompt"))
    assert f"'prompt' is {kind}, not text" in problem


def test_messages_are_conversations_or_json(tmp_path: Path) -> None:
    """list<struct<role, content>> in any order and with more fields, or a JSON string."""
    turn = {"content": "hi", "role": "user", "name": "x"}
    write(tmp_path / "good/a.parquet", {"m": [[turn]], "j": ["[]"]})
    assert checked(tmp_path / "good", InputColumns(messages="m")) == []
    assert checked(tmp_path / "good", InputColumns(messages="j")) == []
    write(tmp_path / "bad/a.parquet", {"m": [[{"role": "user", "text": "x"}]], "n": [1]})
    assert (
        "list<struct<role, content>>"
        in InputSchema.check(list_input(str(tmp_path / "bad")), InputColumns(messages="m"))[1][
            0
        ].hint
    )
    assert len(checked(tmp_path / "bad", InputColumns(messages="n"))) == 1
    assert not is_conversation(pa.struct([("role", pa.string()), ("content", pa.string())]))


def test_ids_are_text_or_integers(tmp_path: Path) -> None:
    """A float is no id."""
    write(tmp_path / "a.parquet", {"prompt": ["x"], "i": pa.array([1], pa.uint8()), "f": [0.5]})
    assert checked(tmp_path, InputColumns(prompt="prompt", id="i")) == []
    assert checked(tmp_path, InputColumns(prompt="prompt", id="f")) == [
        "input: the id column 'f' is double"
    ]


def test_a_missing_column_names_the_file_and_the_nearest_name(tmp_path: Path) -> None:
    """One file of many without the column is found, and a typing error is guessed."""
    write(tmp_path / "a.parquet", {"question": ["x"], "n": [1]})
    write(tmp_path / "b.parquet", {"questoin": ["x"], "n": [1]})
    with pytest.raises(InputError, match=r"b\.parquet has no column 'question'") as caught:
        InputSchema.of(list_input(str(tmp_path)), InputColumns(prompt="question"))
    assert caught.value.hint == "did you mean 'questoin'?"
    with pytest.raises(InputError) as caught:
        InputSchema.of(list_input(str(tmp_path)), InputColumns(prompt="zzz"))
    assert caught.value.hint == "its columns are 'question', 'n'"


def test_every_problem_is_told(tmp_path: Path) -> None:
    """All columns are checked, not up to the first that is wrong."""
    write(tmp_path / "a.parquet", {"n": [1]})
    columns = InputColumns(prompt="n", id="no1", template=("no2",), carried=("no3", "n"))
    assert len(checked(tmp_path, columns)) == 4


def test_a_name_twice_in_a_file_is_ambiguous(tmp_path: Path) -> None:
    """Two columns of one name are refused."""
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["p", "p"])
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "a.parquet")
    assert [
        problem.split(".parquet ")[1] for problem in checked(tmp_path, InputColumns(prompt="p"))
    ] == ["has 2 columns named 'p'"]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (pa.string(), pa.string(), pa.string()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.string_view(), pa.string(), pa.string()),
        (pa.string_view(), pa.string_view(), pa.string_view()),
        (DICTIONARY, pa.string(), pa.string()),
        (DICTIONARY, DICTIONARY, DICTIONARY),
        (pa.dictionary(pa.int8(), pa.string()), DICTIONARY, pa.string()),
        (pa.dictionary(pa.int8(), pa.large_string()), pa.string_view(), pa.large_string()),
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.uint8(), pa.int16(), pa.int16()),
        (pa.int32(), pa.float64(), pa.float64()),
        (pa.null(), pa.int32(), pa.int32()),
        (pa.null(), DICTIONARY, DICTIONARY),
        (pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.string(), pa.int64(), None),
        (pa.bool_(), pa.int64(), None),
        (pa.list_(pa.string()), pa.string(), None),
    ],
)
def test_two_types_become_one(
    first: pa.DataType, second: pa.DataType, both: pa.DataType | None
) -> None:
    """In either order: the narrowest type that holds both, or none."""
    assert both == unify(first, second)
    assert both == unify(second, first)


def test_types_that_cannot_be_reconciled_name_both_files(tmp_path: Path) -> None:
    """Text in one file and numbers in another is an error that names the two."""
    write(tmp_path / "a.parquet", {"prompt": ["x"], "c": ["x"]})
    write(tmp_path / "b.parquet", {"prompt": ["x"], "c": [1]})
    (problem,) = checked(tmp_path, InputColumns(prompt="prompt", carried=("c",)))
    assert "'c' is int64" in problem and "string in" in problem
    assert "a.parquet" in problem and "b.parquet" in problem


def test_a_resumed_run_keeps_its_carried_types(tmp_path: Path) -> None:
    """Later files may be narrower than the parts that exist, never wider."""
    columns = InputColumns(prompt="prompt", carried=("c",))
    write(tmp_path / "1/a.parquet", {**prompts(1), "c": pa.array([1], pa.int32())})
    write(tmp_path / "2/b.parquet", {**prompts(1), "c": pa.array([1], pa.int16())})
    write(tmp_path / "3/c.parquet", {**prompts(1), "c": pa.array([1], pa.int64())})
    earlier = InputSchema.of(list_input(str(tmp_path / "1")), columns)
    assert earlier == InputSchema.from_bytes(earlier.to_bytes(), columns)
    narrower = InputSchema.of(list_input(str(tmp_path / "2")), columns, earlier)
    assert pa.int32() == narrower.carried.field("c").type
    (problem,) = checked(tmp_path / "3", columns, earlier=earlier)
    assert "'c' is int64" in problem and "int32 in the files of earlier submits" in problem


def test_no_file_at_all_gives_no_columns_but_no_error() -> None:
    """An empty list of files is the caller's to judge."""
    assert InputSchema.check([], InputColumns(prompt="p"))[1] == []


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), DICTIONARY], ids=str
)
def test_text_that_is_not_utf8_is_replaced_where_it_is(kind: pa.DataType) -> None:
    """Neighbours stay as they are, byte for byte."""
    base = invalid_utf8([b"ok", b"\xff!", b"\xed\xa0\x80", None, "ü😀".encode()])
    if kind == DICTIONARY:
        indices = pa.array([0, 1, 2, None, 4], pa.int32())
        column = pa.DictionaryArray.from_arrays(indices, base, safe=False)
    else:
        column = base.cast(pa.binary()).cast(as_binary(kind)).view(kind)
    fixed = with_valid_text(column)
    fixed.validate(full=True)
    assert kind == fixed.type
    assert fixed.to_pylist() == ["ok", "\ufffd!", "\ufffd\ufffd\ufffd", None, "ü😀"]


def as_binary(kind: pa.DataType) -> pa.DataType:
    """The binary type of the same layout."""
    return {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }[kind]


def test_nested_text_that_is_not_utf8_is_replaced() -> None:
    """Lists, structs and maps are searched to the bottom."""
    bad = invalid_utf8([b"\xff", b"fine"])
    turns = pa.StructArray.from_arrays([pa.array(["user", "user"]), bad], ["role", "content"])
    column = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), turns)
    fixed = with_valid_text(column)
    assert fixed.to_pylist() == [
        [{"role": "user", "content": "\ufffd"}],
        [{"role": "user", "content": "fine"}],
    ]
    mapped = pa.MapArray.from_arrays(pa.array([0, 2], pa.int32()), pa.array(["a", "b"]), bad)
    assert with_valid_text(mapped).to_pylist() == [[("a", "\ufffd"), ("b", "fine")]]


def test_decoding_strictly_tells_what_is_no_text() -> None:
    """The strict decoder raises, and leaves other values alone."""
    kind = pa.struct([("a", pa.list_(pa.string())), ("b", pa.int32())])
    value = {"a": [b"x", None], "b": 3}
    assert decode(value, kind) == {"a": ["x", None], "b": 3}
    assert pa.struct([("a", pa.list_(pa.large_binary())), ("b", pa.int32())]) == as_bytes(kind)
    with pytest.raises(UnicodeDecodeError):
        decode({"a": [b"\xff"], "b": 3}, kind)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (pa.string(), "text"),
        (DICTIONARY, "text"),
        (pa.null(), "text"),
        (pa.int8(), "number"),
        (pa.float32(), "number"),
        (pa.decimal128(9, 2), "number"),
        (pa.bool_(), "switch"),
        (pa.list_(pa.large_string()), "text"),
        (pa.large_list(pa.list_(pa.int64(), 2)), "number"),
        (pa.binary(), None),
        (pa.date32(), None),
        (pa.list_(pa.struct([("a", pa.string())])), None),
    ],
)
def test_expected_answers_have_usable_types(
    tmp_path: Path, kind: pa.DataType, found: str | None
) -> None:
    """Text, numbers, booleans and lists of them; others are refused with their type."""
    assert answer_kind(kind) == found
    write(tmp_path / "a.parquet", {"prompt": ["x"], "a": pa.array([None], kind)})
    problems = checked(tmp_path, InputColumns(prompt="prompt", answer="a"))
    assert len(problems) == (found is None)
    assert all("the answer column 'a' is " in problem for problem in problems)
