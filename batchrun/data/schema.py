"""Which columns a job uses, and which types they have over all files of the input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import pyarrow as pa

from batchrun.data.footers import InputFile
from batchrun.data.types import answer_kind, is_conversation, is_string, unify
from batchrun.errors import InputError


@dataclass(frozen=True, slots=True)
class InputColumns:
    """The columns that a job reads, by what they are for."""

    id: str | None = None
    prompt: str | None = None
    messages: str | None = None
    template: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    answer: str | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """Columns whose values stand in :attr:`Row.values`, each once."""
        single = [name for name in (self.prompt, self.messages) if name is not None]
        return tuple(dict.fromkeys([*single, *self.template, *self.overrides]))

    @property
    def all(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        single = [name for name in (self.id, self.answer) if name is not None]
        return tuple(dict.fromkeys([*single, *self.values, *self.carried]))


@dataclass(frozen=True, slots=True)
class InputSchema:
    """The type of every column that is used, the same for all files of a run."""

    columns: InputColumns
    schema: pa.Schema

    @classmethod
    def of(
        cls,
        files: Sequence[InputFile],
        columns: InputColumns,
        earlier: InputSchema | None = None,
    ) -> InputSchema:
        """The schema of ``files``; raises InputError naming every problem.

        ``earlier`` is the schema with which parts of this run were written: carried columns keep
        its types, and a file whose values they cannot hold is an error.
        """
        schema, problems = cls.check(files, columns, earlier)
        if len(problems) == 1:
            raise problems[0]
        if problems:
            raise InputError("\n".join(map(str, problems)), problems[0].hint)
        return schema

    @classmethod
    def check(
        cls,
        files: Sequence[InputFile],
        columns: InputColumns,
        earlier: InputSchema | None = None,
    ) -> tuple[InputSchema, list[InputError]]:
        """The schema as far as it goes, and every problem: missing, ambiguous, unusable."""
        problems: list[InputError] = []
        fields: list[pa.Field] = []
        for name in columns.all:
            kind = _unified(files, name, earlier, name in columns.carried, problems)
            if kind is not None:
                problems.extend(_unusable(name, kind, columns))
                fields.append(pa.field(name, kind))
        return cls(columns, pa.schema(fields)), problems

    @property
    def carried(self) -> pa.Schema:
        """The carried columns, in the job's order."""
        return pa.schema([self.schema.field(name) for name in self.columns.carried])

    def to_bytes(self) -> bytes:
        """The types as bytes, for the plan."""
        return bytes(self.schema.serialize().to_pybytes())

    @classmethod
    def from_bytes(cls, data: bytes, columns: InputColumns) -> InputSchema:
        """What :meth:`to_bytes` gave."""
        return cls(columns, pa.ipc.read_schema(pa.BufferReader(data)))


def _unified(
    files: Iterable[InputFile],
    name: str,
    earlier: InputSchema | None,
    carried: bool,
    problems: list[InputError],
) -> pa.DataType | None:
    """The type of a column over all files; None with the reason added to ``problems``."""
    kind: pa.DataType | None = None
    kind_from = ""
    fixed: pa.DataType | None = None
    if earlier is not None and name in earlier.schema.names:
        kind, kind_from = earlier.schema.field(name).type, "the files of earlier submits"
        fixed = kind if carried else None
    for file in files:
        places = file.schema.get_all_field_indices(name)
        if len(places) != 1:
            problems.append(_missing(file, name, len(places)))
            return None
        own = file.schema.field(places[0]).type
        both = own if kind is None else unify(kind, own)
        if both is None or (fixed is not None and not both.equals(fixed)):
            problems.append(
                InputError(
                    f"input: column {name!r} is {own} in {file.uri} but {kind} in {kind_from}",
                    "give the column one type in all files",
                )
            )
            return None
        if kind is None or not both.equals(kind):
            kind, kind_from = both, file.uri
    return kind


def _missing(file: InputFile, name: str, times: int) -> InputError:
    if times > 1:
        return InputError(f"input: {file.uri} has {times} columns named {name!r}", "rename them")
    names = list(file.schema.names)
    near = get_close_matches(name, names, n=1)
    listed = ", ".join(repr(other) for other in names[:20]) or "none"
    return InputError(
        f"input: {file.uri} has no column {name!r}",
        f"did you mean {near[0]!r}?" if near else f"its columns are {listed}",
    )


def _unusable(name: str, kind: pa.DataType, columns: InputColumns) -> list[InputError]:
    """Why a column of this type cannot be what the job uses it for."""
    if pa.types.is_null(kind):
        return []
    found: list[InputError] = []
    if name == columns.prompt and not is_string(kind):
        found.append(
            InputError(
                f"input: the prompt column {name!r} is {kind}, not text",
                "use a template for columns of other types",
            )
        )
    if name == columns.messages and not (is_string(kind) or is_conversation(kind)):
        found.append(
            InputError(
                f"input: the messages column {name!r} is {kind}",
                "it must be list<struct<role, content>> or a JSON string of that",
            )
        )
    if name == columns.id and not (is_string(kind) or pa.types.is_integer(kind)):
        found.append(
            InputError(f"input: the id column {name!r} is {kind}", "use text or integers for ids")
        )
    if name == columns.answer and answer_kind(kind) is None:
        found.append(
            InputError(
                f"input: the answer column {name!r} is {kind}",
                "expected answers are text, numbers, booleans or lists of these",
            )
        )
    return found
