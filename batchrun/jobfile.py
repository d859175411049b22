"""From a YAML job file to plain values that know where they stand: the only module that reads YAML.

The reader is narrower than YAML on purpose, because a job file is read by people and may come from
anywhere: one mapping, no tags, no anchors or aliases, no duplicate keys, at most 256 KiB. Scalars
mean what they mean elsewhere (``yes`` and ``off`` are switches, ``1e-3`` is a number) but for the
surprises of YAML 1.1; see :mod:`batchrun.jobscalars`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from batchrun.errors import JobError, Problem
from batchrun.jobscalars import ScalarError, expand_variables, parse_scalar
from batchrun.logs import printable
from batchrun.wording import dotted, nearest

MAX_JOB_BYTES = 256 * 1024
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class JobSource:
    """A job as written: ``raw`` values by key, and the place of each.

    ``name`` is the file as the user named it. ``places`` maps key paths to ``file:line``, or to
    ``--set``. ``problems`` are those found while reading that leave the rest readable; the key
    paths of their values stand in ``broken``, so that nobody complains about them twice.
    """

    name: str
    raw: Mapping[str, object]
    places: Mapping[KeyPath, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    broken: frozenset[KeyPath] = frozenset()

    @classmethod
    def of_mapping(cls, raw: Mapping[str, object], name: str = "job") -> JobSource:
        """A job that Python code made; every problem's place is ``name``."""
        return cls(name=name, raw=raw)

    def place(self, key: KeyPath | str) -> str:
        """Where ``key`` stands, or the nearest section around it when it is not written at all."""
        path: KeyPath = tuple(key.split(".")) if isinstance(key, str) else key
        while path:
            if path in self.places:
                return self.places[path]
            path = path[:-1]
        return self.places.get((), self.name)


def read_job_file(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> JobSource:
    """Read the job file at ``path`` and put ``overrides`` (``key.path=value``) on top.

    Raises:
        JobError: The file cannot be read as one mapping. Problems of single values come back in
            the result instead, to be reported together with those of the schema.
    """
    name = os.fspath(path)
    reader = _Reader(name, os.environ if environ is None else environ)
    raw = reader.read_document(_read_text(name))
    for override in overrides:
        reader.override(raw, override)
    return JobSource(
        name=name,
        raw=raw,
        places=reader.places,
        problems=tuple(reader.problems),
        broken=frozenset(reader.broken),
    )


def override_job(raw: Mapping[str, object], overrides: Sequence[str], name: str) -> JobSource:
    """A job that is at hand as nested dictionaries, with ``key.path=value`` of the command line
    put on top; problems of all else have ``name`` for their place."""
    reader = _Reader(name, os.environ)
    values = copy.deepcopy(dict(raw))
    for override in overrides:
        reader.override(values, override)
    return JobSource(
        reader.name, values, reader.places, tuple(reader.problems), frozenset(reader.broken)
    )


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """``problems`` in the order of the file, each once; those of the command line come last."""

    def line(problem: Problem) -> int:
        number = problem.location.rpartition(":")[2]
        return int(number) if number.isdigit() else 2**31

    return tuple(sorted(dict.fromkeys(problems), key=line))


def _read_text(name: str) -> str:
    def refuse(message: str, hint: str, line: int | None = None) -> JobError:
        place = printable(name) if line is None else f"{printable(name)}:{line}"
        return JobError((Problem(place, "", message, hint),))

    try:
        with Path(name).open("rb") as file:
            data = file.read(MAX_JOB_BYTES + 1)
    except FileNotFoundError:
        raise refuse("no such file", _other_job_files(name)) from None
    except IsADirectoryError:
        raise refuse("is a folder, not a job file", _other_job_files(name)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise refuse(f"cannot be read: {reason}", "check the path and its permissions") from None
    if len(data) > MAX_JOB_BYTES:
        raise refuse(
            "is larger than 256 KiB, too large for a job file",
            "name a job's YAML file; data belongs in Parquet files under input.path",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise refuse(
            f"is not UTF-8 text (byte 0x{data[error.start]:02x})",
            "save the file as UTF-8, or name a job's YAML file",
            line,
        ) from None
    if not text.strip():
        raise refuse("is empty", "start from one of the files in jobs/, or see `batchrun schema`")
    return text


def _other_job_files(name: str) -> str:
    folder = Path(name) if Path(name).is_dir() else Path(name).parent
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    except OSError:
        files = []
    if not files:
        return "name the YAML file of a job"
    close = nearest(name, [str(p) for p in files])
    if close and not Path(name).is_dir():
        return f"did you mean {close}?"
    shown = ", ".join(str(p) for p in files[:4]) + (", …" if len(files) > 4 else "")
    return f"name one of {shown}" if len(files) > 1 else f"did you mean {shown}?"


class _Reader:
    """Builds values from YAML events, noting places and problems on the way."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.name = printable(name)
        self.environ = environ
        self.places: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self.broken: set[KeyPath] = set()
        self._fixed_place = ""

    def read_document(self, text: str) -> dict[str, object]:
        """The one mapping of a job file. Raises JobError where the text is no such thing."""
        value = self._parse(text)
        if not isinstance(value, dict):
            what = "a list" if isinstance(value, list) else "a single value"
            if value is None and not self.problems:
                what = "nothing but comments"
            self._add((), f"holds {what} at the top", "a job file is a mapping: `model:`, `input:`")
            raise JobError(tuple(self.problems))
        return value

    def override(self, raw: dict[str, object], override: str) -> None:
        """Put one ``key.path=value`` of the command line into ``raw``."""
        key, equals, text = override.partition("=")
        path: KeyPath = tuple(key.strip().split("."))
        self._fixed_place = "--set"
        if not equals or not all(path):
            self.problems.append(
                Problem(
                    "--set",
                    "",
                    f"{override!r} is not of the form key.path=value",
                    "write for example --set generation.max_tokens=256",
                )
            )
            return
        section: dict[str, object] = raw
        for depth, part in enumerate(path[:-1], start=1):
            inner = section.get(str(part))
            if inner is None:
                inner = section[str(part)] = {}
            if not isinstance(inner, dict):
                where = dotted(path[:depth])
                self._add(path, f"{where} is not a section", f"set {where} itself")
                return
            section = inner
        self._forget(path)
        try:
            section[str(path[-1])] = self._override_value(text, path)
        except JobError as error:
            self.problems += error.problems
            self.broken.add(path)
        for end in range(1, len(path) + 1):
            self.places.setdefault(path[:end], "--set")
        self.places[path] = "--set"

    def _override_value(self, text: str, path: KeyPath) -> object:
        # Only text that opens a list, a mapping or a quotation is YAML; all else is one scalar,
        # so that "--set input.system=Answer: yes" and templates need no second quoting.
        if text[:1] in ("[", "{", "'", '"') and text[:2] not in ("{{", "{%"):
            return self._parse(text, path)
        return self._scalar(text, plain=True, path=path)

    def _forget(self, path: KeyPath) -> None:
        """A value that is replaced takes its problems with it."""
        under = [key for key in self.broken if key[: len(path)] == path]
        gone = {dotted(key) for key in under}
        self.broken.difference_update(under)
        self.problems = [problem for problem in self.problems if problem.key not in gone]
        for key in [key for key in self.places if key[: len(path)] == path]:
            del self.places[key]

    def _parse(self, text: str, path: KeyPath = ()) -> object:
        try:
            return self._document(_events(yaml.SafeLoader(text)), path)
        except yaml.MarkedYAMLError as error:
            raise JobError((*self.problems, self._syntax_problem(error, text))) from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            what = f"holds the control character U+{ord(text[error.position]):04X}"
            problem = Problem(self._at(line), "", what, "delete it")
            raise JobError((*self.problems, problem)) from None

    def _document(self, events: Iterator[yaml.Event], path: KeyPath) -> object:
        value: object = None
        documents = 0
        for event in events:
            match event:
                case yaml.DocumentStartEvent():
                    documents += 1
                    if documents > 1:
                        place = self._at(_line(event))
                        message = "a second document begins here (`---`)"
                        problem = Problem(place, "", message, "a job file holds one job")
                        raise JobError((*self.problems, problem))
                case yaml.StreamStartEvent() | yaml.StreamEndEvent() | yaml.DocumentEndEvent():
                    pass
                case _:
                    if not path:
                        self.places[()] = self._at(_line(event))
                    value = self._value(event, events, path)
        return value

    def _value(self, event: yaml.Event, events: Iterator[yaml.Event], path: KeyPath) -> object:
        place = self._at(_line(event))
        self.places.setdefault(path, place)
        self._refuse_extras(event, path, place)
        if len(path) > MAX_DEPTH:
            problem = Problem(place, "", f"is nested deeper than {MAX_DEPTH} levels", "flatten it")
            raise JobError((*self.problems, problem))
        match event:
            case yaml.MappingStartEvent():
                return self._mapping(events, path)
            case yaml.SequenceStartEvent():
                items: list[object] = []
                while not isinstance(item := next(events), yaml.SequenceEndEvent):
                    items.append(self._value(item, events, (*path, len(items))))
                return items
            case yaml.ScalarEvent():
                return self._scalar(event.value, plain=event.style is None, path=path)
        return None  # an alias, already refused

    def _mapping(self, events: Iterator[yaml.Event], path: KeyPath) -> dict[str, object]:
        values: dict[str, object] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            place = self._at(_line(event))
            if not isinstance(event, yaml.ScalarEvent):
                self._refuse_extras(event, path, place)
                self._add(path, "has a key that is no plain word", _QUOTE_TEMPLATES, place)
                self.broken.add(path)
                if not isinstance(event, yaml.AliasEvent):
                    _skip(event, events)
                _skip(next(events), events)
                continue
            key = (*path, event.value)
            self._refuse_extras(event, key, place)
            if event.value in values:
                hint = f"it stands in line {self.places[key].rpartition(':')[2]} too; delete one"
                self._add(key, "is there twice", hint, place)
                _skip(next(events), events)
                continue
            if event.value == "<<" and event.style is None:
                self._add(key, "merge keys are not allowed in a job file", "write the keys out")
                self.broken.add(key)
                _skip(next(events), events)
                continue
            self.places[key] = place
            values[event.value] = self._value(next(events), events, key)
        return values

    def _refuse_extras(self, event: yaml.Event, path: KeyPath, place: str) -> None:
        """Refuse anchors, aliases and tags where they stand, before anything is expanded."""
        if isinstance(event, yaml.AliasEvent):
            self._add(path, f"the alias *{event.anchor} is not allowed", "write it out", place)
        elif (anchor := getattr(event, "anchor", None)) is not None:
            what = f"the anchor &{anchor} is not allowed"
            self._add(path, what, "delete it, and write values out where they are used", place)
        elif (tag := getattr(event, "tag", None)) is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            self._add(path, f"the YAML tag {shown} is not allowed", "delete the tag", place)
        else:
            return
        self.broken.add(path)

    def _scalar(self, text: str, *, plain: bool, path: KeyPath) -> object:
        try:
            text = expand_variables(text, self.environ)
            return parse_scalar(text) if plain else text
        except ScalarError as error:
            self._add(path, error.message, error.hint)
            self.broken.add(path)
            return None

    def _add(self, path: KeyPath, message: str, hint: str, place: str = "") -> None:
        place = place or self._fixed_place or self._place_of(path)
        self.problems.append(Problem(place, dotted(path), message, hint))

    def _place_of(self, path: KeyPath) -> str:
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def _at(self, line: int) -> str:
        return self._fixed_place or f"{self.name}:{line}"

    def _syntax_problem(self, error: yaml.MarkedYAMLError, text: str) -> Problem:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        lines = text.splitlines()
        written = lines[line] if line < len(lines) else ""
        what = (error.problem or "cannot be read").replace("could not find expected ':'", _NO_COLON)
        hint = "see the line above too: a missing quote or a wrong indent shows only here"
        if "\t" in written[: column + 1]:
            what, hint = "a tab in the indent", "YAML indents with spaces only"
        elif "{{" in written or "{%" in written:
            hint = _QUOTE_TEMPLATES
        elif error.problem == "mapping values are not allowed here":
            hint = "put quotes around a value that holds `: `, or mend the indent"
        return Problem(self._at(line + 1), "", f"column {column + 1}: not valid YAML: {what}", hint)


_QUOTE_TEMPLATES = "put quotes around a template, as YAML reads {{ … }} as a mapping"
_NO_COLON = "a key without `:`"


def _events(loader: yaml.SafeLoader) -> Iterator[yaml.Event]:
    while loader.check_event():
        event: yaml.Event = loader.get_event()  # type: ignore[no-untyped-call]
        yield event


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _skip(event: yaml.Event, events: Iterator[yaml.Event]) -> None:
    """Read past the value that ``event`` begins."""
    depth = 0
    while True:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth == 0:
            return
        event = next(events)
