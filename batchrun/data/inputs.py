"""Finding the input: from a path, a folder, a glob or a list of them to files with footers."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from batchrun.data.border import Role, border, check_url, filesystem, local_path, scheme_of
from batchrun.data.footers import InputFile, RowGroup, read_footer
from batchrun.data.remote import fingerprint_of
from batchrun.data.schema import InputColumns, InputSchema
from batchrun.data.shards import plan_shards
from batchrun.errors import BatchrunError, InputError

__all__ = [
    "InputColumns",
    "InputFile",
    "InputSchema",
    "RowGroup",
    "find_input",
    "list_input",
    "plan_shards",
]

_FOOTER_THREADS = 16
_GLOB = frozenset("*?[")
_MAX_NAMED = 20


@dataclass(frozen=True, slots=True)
class _Found:
    """A file found by listing, before its footer is read."""

    fs: Any
    location: str
    uri: str
    base: str
    info: Mapping[str, Any]

    @property
    def path(self) -> str:
        """The path relative to what the job named."""
        return posixpath.relpath(self.location, self.base)


def list_input(
    paths: str | Sequence[str],
    storage_options: Mapping[str, object] | None = None,
    known: Sequence[InputFile] = (),
) -> list[InputFile]:
    """The files of the input in name order, each path of the job in the job's order.

    Footers of ``known`` files are not read again where the listing says that nothing changed.
    Raises one :class:`~batchrun.errors.InputError` that names every problem found; see
    :func:`find_input` for them one by one. StorageError when storage cannot be reached.
    """
    files, problems = find_input(paths, storage_options, known)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        named = [str(problem) for problem in problems[:_MAX_NAMED]]
        if len(problems) > _MAX_NAMED:
            named.append(f"and {len(problems) - _MAX_NAMED} more")
        raise InputError("\n".join(named), problems[0].hint)
    return files


def find_input(
    paths: str | Sequence[str],
    storage_options: Mapping[str, object] | None = None,
    known: Sequence[InputFile] = (),
    *,
    choose: Callable[[Mapping[str, int]], Iterable[str]] | None = None,
) -> tuple[list[InputFile], list[BatchrunError]]:
    """The usable files of the input, and everything that is wrong with the rest.

    A folder means its ``*.parquet``, recursively, without names that begin with ``_`` or ``.``;
    a file that several paths lead to counts once. Footers are read in parallel. ``choose`` is
    told the URI and size in bytes of every file, and gives those whose footers are to be read.
    """
    entries = [paths] if isinstance(paths, str) else list(paths)
    found: dict[str, _Found] = {}
    problems: list[BatchrunError] = []
    if not entries:
        problems.append(InputError("input: no path is given", "name a file, a folder or a glob"))
    for entry in entries:
        try:
            for item in _list_entry(entry, storage_options):
                found.setdefault(item.uri, item)
        except BatchrunError as error:
            problems.append(error)
    names = _names(list(found.values()))
    by_uri = {file.uri: file for file in known}

    def read(item: _Found) -> InputFile | BatchrunError:
        try:
            check_url(item.uri, Role.INPUT)
            before = by_uri.get(item.uri)
            if before is not None and _is_unchanged(before, item):
                return replace(before, path=names[item.uri])
            return read_footer(item.fs, item.location, item.uri, names[item.uri], item.info)
        except BatchrunError as error:
            return error

    if choose is not None:
        chosen = choose({uri: int(item.info["size"]) for uri, item in found.items()})
        found = {uri: found[uri] for uri in chosen}
    files: list[InputFile] = []
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        for outcome in pool.map(read, found.values()):
            if isinstance(outcome, InputFile):
                files.append(outcome)
            else:
                problems.append(outcome)
    return files, problems


def _is_unchanged(file: InputFile, found: _Found) -> bool:
    now = (int(found.info["size"]), str(found.info["fingerprint"]))
    return now == (file.size_bytes, file.fingerprint)


def _list_entry(entry: str, storage_options: Mapping[str, object] | None) -> list[_Found]:
    """The files that one path of the job means, in name order."""
    if scheme_of(entry) == "file":
        entry = entry if not entry.strip() else local_path(entry)
    fs, root = filesystem(entry, storage_options, Role.INPUT)
    with border(Role.INPUT, entry, early=True):
        if fs.isfile(root):
            located, base = {root: fs.info(root)}, posixpath.dirname(root)
        elif _GLOB & set(root) and not fs.isdir(root):
            located, base = _match_glob(fs, root)
            if not located:
                raise InputError(f"input: no file matches {entry}", "check the pattern")
        else:
            located, base = _list_folder(fs, root), root
            if not located and not fs.exists(root):
                raise InputError(f"input: {entry} does not exist", "check the path")
            if not located:
                raise InputError(
                    f"input: {entry} holds no *.parquet file",
                    "names that begin with _ or . do not count",
                )
        return [
            _Found(fs, location, _uri(fs, location), base, _described(fs, location, info))
            for location, info in sorted(located.items())
        ]


def _match_glob(fs: Any, pattern: str) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Files that match, with folders among the matches meaning their *.parquet."""
    fixed = pattern[: min(pattern.index(mark) for mark in _GLOB if mark in pattern)]
    base = fixed.rpartition("/")[0]
    located: dict[str, Mapping[str, Any]] = {}
    for location, info in fs.glob(pattern, detail=True).items():
        if _hidden(posixpath.relpath(location, base)):
            continue
        if info["type"] == "directory":
            located.update(_list_folder(fs, location))
        else:
            located[location] = info
    return located, base


def _list_folder(fs: Any, folder: str) -> dict[str, Mapping[str, Any]]:
    """The *.parquet files below a folder, without hidden names."""
    try:
        found = fs.find(folder, detail=True, withdirs=False)
    except FileNotFoundError as error:
        if error.__cause__ is not None:
            raise  # the bucket itself is missing
        return {}
    return {
        location: info
        for location, info in found.items()
        if location.endswith(".parquet")
        and info["type"] != "directory"
        and not _hidden(posixpath.relpath(location, folder))
    }


def _hidden(relative: str) -> bool:
    return any(piece.startswith(("_", ".")) for piece in relative.split("/"))


def _described(fs: Any, location: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """Size and fingerprint of a file; local times in nanoseconds, which fsspec rounds."""
    return {"size": info["size"], "fingerprint": fingerprint(fs, location, info)}


def fingerprint(fs: Any, location: str, info: Mapping[str, Any] | None = None) -> str:
    """What pins the bytes of the file at ``location`` of ``fs`` now."""
    if "file" in _protocols(fs):
        status = os.stat(location)
        return f"{status.st_size}-{status.st_mtime_ns}"
    return fingerprint_of(fs.info(location) if info is None else info)


def _uri(fs: Any, location: str) -> str:
    return location if "file" in _protocols(fs) else str(fs.unstrip_protocol(location))


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _names(found: Iterable[_Found]) -> dict[str, str]:
    """The path of each file in row ids: relative to its entry, and longer where that is shared.

    Two entries of a list may hold files of one relative path; these are named from the folder
    that all files have in common.
    """
    items = list(found)
    shared: dict[str, int] = {}
    for item in items:
        shared[item.path] = shared.get(item.path, 0) + 1
    if all(count == 1 for count in shared.values()):
        return {item.uri: item.path for item in items}
    common = posixpath.commonpath([posixpath.dirname(item.uri) for item in items])
    return {
        item.uri: item.path if shared[item.path] == 1 else posixpath.relpath(item.uri, common)
        for item in items
    }
