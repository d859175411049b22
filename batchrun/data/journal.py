"""The journal of a shard: what is generated and not published yet, so that nobody does it again.

Workers write objects, each once and whole; whoever takes the shard next reads all of them. An
object holds finished samples, and for samples that still run the tokens since the object before.
A journal may be damaged or lost at any time: what it does not hold is generated again.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
import weakref
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from batchrun.data.blocks import MAX_LINE_BYTES, read_header, read_lines, to_bytes
from batchrun.data.entries import Running, read_entry, write_finished, write_running
from batchrun.data.layout import journal_folder, shard_digest
from batchrun.data.store import ObjectInfo, Store
from batchrun.errors import StorageError
from batchrun.records import Completion, Generated, Lease, Shard, attempt_epoch

__all__ = ["Journal", "JournalWriter", "Running", "delete_journal", "read_journal"]

_VERSION = 1
_NAME = re.compile(r"(?P<attempt>.+)-(?P<seq>\d{4,9})\.zst")
_MAX_OBJECT_BYTES = 128 << 20
_MAX_LINES_BYTES = 64 << 20  # of one object, before compression
_READERS = 4
_MAX_SEQS = 100

_log = logging.getLogger(__name__)


class JournalWriter:
    """Writes the journal of one lease. Not thread-safe."""

    def __init__(self, store: Store, run: str, lease: Lease) -> None:
        self._store = store
        self._run = run
        self._lease = lease
        self._seq = 0

    def flush(self, finished: Sequence[Completion], running: Sequence[Running] = ()) -> None:
        """Make these durable; returns when they are.

        Raises StorageError when that is not known. The next call may then bring the same again:
        whatever arrived twice counts once. A sample of more than 32 MiB is left out with a
        warning: should its worker die before the part stands, it is generated again.
        """
        lines: list[tuple[Completion | Running, bytes]]
        lines = [(item, write_finished(item)) for item in finished]
        lines += [(item, write_running(item)) for item in running]
        group: list[bytes] = []
        num_bytes = 0
        for item, line in lines:
            if len(line) > MAX_LINE_BYTES:
                _log.warning(
                    "shard %s: sample %d of row %d has %d bytes, more than a journal holds; it is "
                    "not safe before the shard's part is",
                    self._lease.shard.name,
                    item.sample,
                    item.ordinal,
                    len(line),
                )
                continue
            if group and num_bytes + len(line) > _MAX_LINES_BYTES:
                self._put(group)
                group, num_bytes = [], 0
            group.append(line)
            num_bytes += len(line)
        if group:
            self._put(group)

    def _put(self, lines: Sequence[bytes]) -> None:
        folder = journal_folder(self._run, self._lease.shard.number)
        for _ in range(_MAX_SEQS):
            # A number whose put may have failed is not used again: the object may yet arrive.
            seq, self._seq = self._seq, self._seq + 1
            header = {
                **_header(self._run, self._lease.shard),
                "attempt": self._lease.attempt,
                "seq": seq,
            }
            path = f"{folder}/{self._lease.attempt}-{seq:04d}.zst"
            if self._store.put_if_absent(path, to_bytes(header, lines), uuid.uuid4().hex):
                return
        raise StorageError(
            f"output: {self._store.url}/{folder} holds another journal of this very attempt",
            "submit again to resume",
        )


@dataclass(frozen=True, slots=True)
class Journal:
    """What the journal of a shard holds, by (ordinal, sample).

    ``finished`` are whole samples; they wait on local disk and are read when they are asked for.
    ``running`` is what was sampled so far of others. ``epochs`` has for each row of the shard the
    latest epoch under which a sample of it was finished, 0 where that was before the journal.
    ``num_damaged`` counts what could not be read: a damaged object, block or record is one each.
    """

    finished: Mapping[tuple[int, int], Completion] = field(default_factory=dict)
    running: Mapping[tuple[int, int], Generated] = field(default_factory=dict)
    epochs: Sequence[int] = ()
    num_damaged: int = 0


def read_journal(
    store: Store, run: str, shard: Shard, n: int = 1, kept: Iterable[Completion] = ()
) -> Journal:
    """Everything that was journaled for a shard, whose rows have ``n`` samples.

    ``kept`` are samples that are known from elsewhere: they are in the result and count first.

    The first finished record of a sample counts, else the longest chain of its tokens that one
    attempt left without a gap. Raises StorageError when storage fails, and for nothing else.
    """
    found = _in_order(store.list(journal_folder(run, shard.number)))
    if not found and kept == ():
        return Journal()
    merge = _Merge(shard, n)
    for completion in kept:
        merge.keep(completion)
    for start in range(0, len(found), _READERS):
        group = found[start : start + _READERS]
        with ThreadPoolExecutor(_READERS) as pool:
            contents = list(pool.map(lambda item: _read(store, item[2]), group))
        for (attempt, seq, _), data in zip(group, contents, strict=True):
            if data is not None:
                expected = {**_header(run, shard), "attempt": attempt, "seq": seq}
                merge.add(attempt, data, expected)
    journal = merge.result()
    if journal.num_damaged:
        _log.warning(
            "the journal of shard %s is damaged in %d places; what was there is generated again",
            shard.name,
            journal.num_damaged,
        )
    return journal


def delete_journal(
    store: Store,
    run: str,
    shards: Iterable[int] | None = None,
    *,
    spare: Iterable[int] = (),
) -> int:
    """Delete the journals of these shards, or of all but ``spare``; the number of objects
    deleted."""
    folders = (
        [journal_folder(run)]
        if shards is None
        else [journal_folder(run, number) for number in shards]
    )
    spared = tuple(f"{journal_folder(run, number)}/" for number in spare)
    found = (item.path for folder in folders for item in store.list(folder))
    paths = [path for path in found if not path.startswith(spared)]
    if paths:
        store.delete(paths)
    return len(paths)


def _header(run: str, shard: Shard) -> dict[str, object]:
    """What an object must say of itself to be of this shard's journal."""
    return {"version": _VERSION, "run": run, "rows": shard_digest(run, shard)}


def _in_order(listed: Iterable[ObjectInfo]) -> list[tuple[str, int, ObjectInfo]]:
    """Attempt, number and place of every object, in the order in which they count."""
    found = []
    for item in listed:
        name = _NAME.fullmatch(item.path.rpartition("/")[2])
        if name is not None:
            found.append((name["attempt"], int(name["seq"]), item))
    return sorted(found, key=lambda entry: entry[:2])


def _read(store: Store, item: ObjectInfo) -> bytes | None:
    """The bytes of an object, b"" for one that is too big; None where it was deleted meanwhile."""
    return b"" if item.size_bytes > _MAX_OBJECT_BYTES else store.read(item.path)


class _Merge:
    """Puts the objects of a journal together, in their order."""

    def __init__(self, shard: Shard, n: int) -> None:
        self._num_rows = shard.num_rows
        self._n = n
        self._finished = _Finished(shard.num_rows, n)
        self._epochs = array("q", bytes(8 * shard.num_rows))
        self._chains: dict[str, dict[tuple[int, int], Generated]] = {}
        self._broken: set[tuple[str, int, int]] = set()
        self._num_damaged = 0

    def keep(self, completion: Completion) -> None:
        """A finished sample that counts before all that comes."""
        self._finish(completion, write_finished(completion), 0)

    def add(self, attempt: str, data: bytes, expected: Mapping[str, object]) -> None:
        """The next object of ``attempt``."""
        if read_header(data) != expected:
            self._num_damaged += 1
            return
        for line in read_lines(data):
            entry = None if line is None else read_entry(line)
            if entry is None or not self._is_in_shard(entry):
                self._num_damaged += 1
            elif isinstance(entry, Completion):
                assert line is not None
                self._finish(entry, line, attempt_epoch(attempt))
            else:
                self._extend(attempt, entry)

    def result(self) -> Journal:
        """The journal so far."""
        longest: dict[tuple[int, int], Generated] = {}
        for chains in self._chains.values():
            for key, chain in chains.items():
                best = longest.get(key)
                is_longer = best is None or len(chain.token_ids) > len(best.token_ids)
                if chain.token_ids and is_longer and key not in self._finished:
                    longest[key] = chain
        self._finished.seal()
        return Journal(self._finished, longest, self._epochs, self._num_damaged)

    def _finish(self, completion: Completion, line: bytes, epoch: int) -> None:
        if self._finished.add(completion.ordinal, completion.sample, line):
            self._epochs[completion.ordinal] = max(self._epochs[completion.ordinal], epoch)

    def _is_in_shard(self, entry: Completion | Running) -> bool:
        return entry.ordinal < self._num_rows and entry.sample < self._n

    def _extend(self, attempt: str, entry: Running) -> None:
        """Append what an attempt says it sampled on, unless something before it is missing; what
        it sampled from the beginning again takes the place of what it had."""
        key = (entry.ordinal, entry.sample)
        chains = self._chains.setdefault(attempt, {})
        chain = chains.get(key, Generated((), None if entry.generated.logprobs is None else ()))
        if (attempt, *key) in self._broken and entry.at:
            return
        known, told = chain.token_ids, entry.generated.token_ids
        shared = len(known) - entry.at
        agrees = shared >= 0 and known[entry.at :][: len(told)] == told[:shared]
        if not agrees or (chain.logprobs is None) != (entry.generated.logprobs is None):
            if entry.at:
                # What comes after a gap has no place; what contradicts is not to be trusted.
                self._broken.add((attempt, *key))
            else:
                # The engine failed on the sample, and the attempt began it anew.
                self._broken.discard((attempt, *key))
                chains[key] = entry.generated
            return
        if len(told) <= shared:
            return  # it arrived twice
        logprobs = None
        if chain.logprobs is not None and entry.generated.logprobs is not None:
            logprobs = chain.logprobs + entry.generated.logprobs[shared:]
        closed_after = entry.generated.closed_after
        if closed_after is None:
            closed_after = chain.closed_after
        chains[key] = Generated(known + told[shared:], logprobs, closed_after)


class _Finished(Mapping[tuple[int, int], Completion]):
    """Finished samples in a local file without a name, which goes with this object.

    In memory are a dozen bytes for each sample of the shard.
    """

    def __init__(self, num_rows: int, n: int) -> None:
        self._n = n
        self._starts = np.full(num_rows * n, -1, np.int64)
        self._lengths = np.zeros(num_rows * n, np.int32)
        self._len = 0
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(prefix="batchrun-journal-")  # noqa: SIM115
        except OSError as error:
            raise _disk_error(error) from error
        weakref.finalize(self, self._file.close)

    def add(self, ordinal: int, sample: int, line: bytes) -> bool:
        """Keep the line of a sample, unless one is there: then False."""
        place = ordinal * self._n + sample
        if self._starts[place] >= 0:
            return False
        try:
            self._file.write(line)
        except OSError as error:
            raise _disk_error(error) from error
        self._starts[place], self._lengths[place] = self._end, len(line)
        self._end += len(line)
        self._len += 1
        return True

    def seal(self) -> None:
        """Nothing more comes; from here on any thread may read."""
        try:
            self._file.flush()
        except OSError as error:
            raise _disk_error(error) from error

    def __getitem__(self, key: tuple[int, int]) -> Completion:
        if key not in self:
            raise KeyError(key)
        place = key[0] * self._n + key[1]
        start, length = int(self._starts[place]), int(self._lengths[place])
        entry = read_entry(os.pread(self._file.fileno(), length, start))
        assert isinstance(entry, Completion), "it was read before"
        return entry

    def __contains__(self, key: object) -> bool:
        match key:
            case (int(ordinal), int(sample)) if ordinal >= 0 and 0 <= sample < self._n:
                place = ordinal * self._n + sample
                return place < len(self._starts) and bool(self._starts[place] >= 0)
            case _:
                return False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for place in np.flatnonzero(self._starts >= 0).tolist():
            yield divmod(place, self._n)

    def __len__(self) -> int:
        return self._len


def _disk_error(error: OSError) -> StorageError:
    return StorageError(
        f"the local disk cannot hold the journal of a shard ({error})",
        "make room in the folder for temporary files (TMPDIR) and submit again to resume",
    )
