"""What stores in object storage have in common: listing and reading through fsspec."""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from batchrun.data.border import Fault, Role, border, check_path, classify, filesystem, translate
from batchrun.data.store import ObjectInfo, Store
from batchrun.errors import OutputError

T = TypeVar("T")

# Waits between tries, in seconds: full jitter below a bound that doubles, for about a minute.
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_MAX_TRIES = 8
_RACERS = 8


def fingerprint_of(info: Mapping[str, Any]) -> str:
    """What pins the bytes of a file: its ETag, else its size and its time of change."""
    for key in ("ETag", "etag", "md5Hash", "generation"):
        if info.get(key):
            return str(info[key]).strip('"')
    changed = next((info[key] for key in ("mtime", "LastModified", "created") if key in info), "")
    return f"{info.get('size')}-{changed}"


class RemoteStore(Store):
    """A prefix of a bucket. Subclasses know how their service creates an object only once, and
    whether their library waits out by itself what passes."""

    _is_patient = False

    def __init__(self, url: str, storage_options: Mapping[str, object] | None) -> None:
        if not url.partition("://")[2].partition("/")[0]:
            raise OutputError(f"output: {url} names no bucket", "give s3://bucket/prefix")
        super().__init__(url.rstrip("/"))
        fs, path = filesystem(self.url, storage_options, Role.OUTPUT)
        self._fs: Any = fs
        self._root = path.strip("/")
        self.bucket, _, self._prefix = self._root.partition("/")

    def list(self, folder: str = "", *, recursive: bool = True) -> tuple[ObjectInfo, ...]:
        """See :meth:`Store.list`."""
        start = self._root
        if folder.strip("/"):
            start += "/" + check_path(folder.strip("/"), Role.OUTPUT)

        def attempt() -> dict[str, dict[str, Any]]:
            try:
                if recursive:
                    return cast(
                        dict[str, dict[str, Any]],
                        self._fs.find(start, withdirs=False, detail=True, refresh=True),
                    )
                items = self._fs.ls(start, detail=True, refresh=True)
                return {item["name"]: item for item in items}
            except FileNotFoundError as error:
                if classify(error) is Fault.NO_BUCKET:
                    raise
                return {}

        found = self._patiently(attempt, folder.strip("/"))
        return tuple(
            ObjectInfo(name[len(self._root) + 1 :], int(item["size"] or 0), fingerprint_of(item))
            for name, item in sorted(found.items())
            if item["type"] == "file" and name.startswith(self._root + "/") and name[-1] != "/"
        )

    def folders(self, folder: str) -> tuple[str, ...]:
        """See :meth:`Store.folders`."""
        start = self._key(folder)

        def attempt() -> tuple[str, ...]:
            try:
                items = self._fs.ls(start, detail=True, refresh=True)
            except FileNotFoundError as error:
                if classify(error) is Fault.NO_BUCKET:
                    raise
                return ()
            names = [item["name"] for item in items if item["type"] == "directory"]
            return tuple(sorted(name.rstrip("/").rpartition("/")[2] for name in names))

        return self._patiently(attempt, folder)

    def info(self, path: str) -> ObjectInfo | None:
        """See :meth:`Store.info`."""
        key = self._key(path)
        try:
            found = self._patiently(lambda: self._fs.info(key, refresh=True), path)
        except _AbsentError:
            return None
        if found["type"] != "file":
            return None
        return ObjectInfo(path, int(found["size"]), fingerprint_of(found))

    def read(self, path: str) -> bytes | None:
        """See :meth:`Store.read`."""
        key = self._key(path)
        try:
            return bytes(self._patiently(lambda: self._fs.cat_file(key), path))
        except _AbsentError:
            return None

    def open_file(self, path: str) -> BinaryIO:
        """See :meth:`Store.open_file`."""
        key = self._key(path)
        try:
            return cast(BinaryIO, self._patiently(lambda: self._fs.open(key, "rb"), path))
        except _AbsentError as error:
            raise OutputError(f"output: {self.url}/{path} does not exist") from error

    def put(self, path: str, data: bytes) -> None:
        """See :meth:`Store.put`."""
        key = self._key(path)
        self._patiently(lambda: self._fs.pipe_file(key, data), path)

    def copy(self, source: str, target: str) -> None:
        """See :meth:`Store.copy`."""
        start, end = self._key(source), self._key(target)
        try:
            self._patiently(lambda: self._copy(start, end), target)
        except _AbsentError as error:
            raise OutputError(f"output: {self.url}/{source} does not exist") from error

    def put_if_absent(
        self,
        path: str,
        data: bytes | Path,
        token: str,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """See :meth:`Store.put_if_absent`.

        A conditional put is not idempotent under a silent retry: when the first answer is lost,
        the second one says "exists" of our own object. So whatever is said but plain success is
        decided by reading back whose token the object bears. An object that is not there *yet*
        may still arrive; the same create is then sent again and a late twin is refused.
        """
        key = self._key(path)
        kept = {**(metadata or {}), "batchrun-token": token}

        def attempt() -> bool:
            try:
                self._create(key, data, kept)
                return True
            except Exception as error:
                fault = classify(error)
                if fault in {Fault.DENIED, Fault.NO_CREDENTIALS, Fault.NO_BUCKET, Fault.UNUSABLE}:
                    raise
                owner = self._token(key)
                if owner is not None:
                    return owner == token
                raise NotLandedError(f"the put of {path} was not answered") from error

        return self._patiently(attempt, path)

    def delete(self, paths: Iterable[str]) -> None:
        """See :meth:`Store.delete`."""
        keys = [self._key(path) for path in paths]
        for start in range(0, len(keys), 1000):
            batch = keys[start : start + 1000]
            self._patiently(lambda batch=batch: self._delete(batch), "")  # type: ignore[misc]

    def probe(self) -> None:
        """See :meth:`Store.probe`. Eight writers race for one key: exactly one may win."""
        path = f"_batchrun/probe-{uuid.uuid4().hex}"
        key = self._key(path)
        try:
            with border(Role.OUTPUT, self.url, early=True):
                with ThreadPoolExecutor(_RACERS) as pool:
                    answers = list(pool.map(lambda n: self._probe_create(key, n), range(_RACERS)))
                if sum(answers) != 1:
                    raise OutputError(
                        f"output: {self.url} ignores create-only puts (If-None-Match)",
                        "use a store that honours them; without them a run could overwrite parts",
                    )
                owner = self._token(key)
                if owner != str(answers.index(True)):
                    raise OutputError(f"output: {self.url} does not keep an object's metadata")
        finally:
            # The probe's own verdict matters more than what it leaves.
            with contextlib.suppress(Exception):
                self._delete([key])

    def _probe_create(self, key: str, racer: int) -> bool:
        """One racer of the probe; its number is its token, so a lost answer does not count. Waits
        out what passes, as a submit may fall into a storm."""
        for tries in range(1, _MAX_TRIES + 1):
            try:
                self._create(key, b"probe", {"batchrun-token": str(racer)})
                return True
            except Exception as error:
                fault = classify(error)
                if fault is Fault.EXISTS:
                    return self._token(key) == str(racer)
                if fault is not Fault.TRANSIENT or tries == _MAX_TRIES:
                    raise
            _wait(tries)
        raise AssertionError("unreachable")

    def _patiently(self, attempt: Callable[[], T], path: str) -> T:
        """The answer of ``attempt``, tried again while storage is throttling or away."""
        url = f"{self.url}/{path}".rstrip("/")
        for tries in range(1, _MAX_TRIES + 1):
            try:
                return attempt()
            except NotLandedError as error:
                if tries == _MAX_TRIES:
                    raise translate(TimeoutError(str(error)), Role.OUTPUT, url) from error
            except Exception as error:
                fault = classify(error)
                if fault is Fault.ABSENT:
                    raise _AbsentError(path) from error
                last = self._is_patient or tries == _MAX_TRIES
                if fault is not Fault.TRANSIENT or last:
                    raise translate(error, Role.OUTPUT, url) from error
            _wait(tries)
        raise AssertionError("unreachable")

    def _key(self, path: str) -> str:
        return f"{self._root}/{check_path(path, Role.OUTPUT)}"

    @abstractmethod
    def _create(self, key: str, data: bytes | Path, metadata: Mapping[str, str]) -> None:
        """One create-only put; raises whatever the library raises."""

    @abstractmethod
    def _token(self, key: str) -> str | None:
        """The token of the object at ``key``; "" for one without, None when there is none."""

    @abstractmethod
    def _copy(self, source: str, target: str) -> None:
        """One copy inside the service, metadata too; raises whatever the library raises."""

    @abstractmethod
    def _delete(self, keys: Sequence[str]) -> None:
        """Delete the keys; absent ones are no error."""


def _wait(tries: int) -> None:
    """Wait after so many tries, by chance, so that many who wait do not come back together."""
    time.sleep(random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**tries)))


class _AbsentError(Exception):
    """There is no such object; never leaves this module."""


class NotLandedError(Exception):
    """A request was answered, and has not done what it should: it is sent again. Never leaves the
    stores."""
