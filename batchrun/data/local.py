"""Objects as files of a local (or mounted) folder."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from batchrun.data.border import Role, border, check_path, local_path
from batchrun.data.store import ObjectInfo, Store
from batchrun.errors import OutputError, StorageError

# Files still being written; dataset readers ignore names that begin with a dot.
_TEMPORARY = ".batchrun-"
_COPY_BYTES = 1 << 20


class LocalStore(Store):
    """A local folder. Files appear whole: written aside, synced, then linked or renamed."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.root = Path(local_path(url))

    def list(self, folder: str = "", *, recursive: bool = True) -> tuple[ObjectInfo, ...]:
        """See :meth:`Store.list`."""
        start = self.root if folder in {"", "/"} else self._path(folder.rstrip("/"))
        found: list[ObjectInfo] = []
        with border(Role.OUTPUT, str(start)):
            for parent, _, names in os.walk(start, onerror=_raise_unless_absent):
                for name in names:
                    if not name.startswith(_TEMPORARY):
                        found.extend(self._describe(Path(parent) / name))
                if not recursive:
                    break
        return tuple(sorted(found, key=lambda item: item.path))

    def folders(self, folder: str) -> tuple[str, ...]:
        """See :meth:`Store.folders`."""
        start = self._path(folder)
        with border(Role.OUTPUT, str(start)):
            if not start.is_dir():
                return ()
            return tuple(sorted(item.name for item in start.iterdir() if item.is_dir()))

    def info(self, path: str) -> ObjectInfo | None:
        """See :meth:`Store.info`."""
        with border(Role.OUTPUT, path):
            return next(iter(self._describe(self._path(path))), None)

    def read(self, path: str) -> bytes | None:
        """See :meth:`Store.read`."""
        target = self._path(path)
        with border(Role.OUTPUT, str(target)):
            try:
                return target.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def open_file(self, path: str) -> BinaryIO:
        """See :meth:`Store.open_file`."""
        target = self._path(path)
        with border(Role.OUTPUT, str(target)):
            return target.open("rb")

    def put(self, path: str, data: bytes) -> None:
        """See :meth:`Store.put`. A rename replaces the old file in one step."""
        target = self._path(path)
        with border(Role.OUTPUT, str(target)), self._written(target, data) as temporary:
            _replace(temporary, target)

    def copy(self, source: str, target: str) -> None:
        """See :meth:`Store.copy`."""
        found, place = self._path(source), self._path(target)
        if not found.is_file():
            raise OutputError(f"output: {found} does not exist")
        with border(Role.OUTPUT, str(place)), self._written(place, found) as temporary:
            _replace(temporary, place)

    def put_if_absent(
        self,
        path: str,
        data: bytes | Path,
        token: str,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """See :meth:`Store.put_if_absent`. A hard link is the atomic create; a rename would
        overwrite. On a network disk a link that reports failure may have succeeded: then the
        temporary file has two links. One that is gone was swept away by a driver that took us for
        dead; it is written again."""
        target = self._path(path)
        while True:
            with border(Role.OUTPUT, str(target)), self._written(target, data) as temporary:
                try:
                    os.link(temporary, target)
                except OSError as error:
                    try:
                        num_links = os.stat(temporary).st_nlink
                    except FileNotFoundError:
                        continue
                    if num_links != 2:
                        if error.errno == errno.EEXIST:
                            return False
                        raise
                _sync_folder(target.parent)
                return True

    def delete(self, paths: Iterable[str]) -> None:
        """See :meth:`Store.delete`. Folders that become empty go too, up to the root."""
        for path in paths:
            target = self._path(path)
            with border(Role.OUTPUT, str(target)):
                target.unlink(missing_ok=True)
                for parent in target.parents:
                    if parent == self.root or self.root not in parent.parents:
                        break
                    try:
                        parent.rmdir()
                    except OSError:
                        break

    def probe(self) -> None:
        """See :meth:`Store.probe`. Folders that had to be made for it are removed again."""
        with border(Role.OUTPUT, str(self.root), early=True):
            made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
            above = made[-1].parent if made else self.root
            if not above.is_dir():
                raise OutputError(f"output: {above} is a file", "give the path of a folder")
        name = f"{_TEMPORARY}probe-{uuid.uuid4().hex}"
        try:
            with border(Role.OUTPUT, str(self.root), early=True):
                self._probe_create(name)
        finally:
            with suppress(OSError):  # what kept the probe from being made is what matters
                (self.root / name).unlink(missing_ok=True)
            for folder in made:
                try:
                    folder.rmdir()
                except OSError:
                    break

    def _probe_create(self, name: str) -> None:
        target = self.root / name
        with self._written(target, b"probe") as temporary:
            try:
                os.link(temporary, target)
            except OSError as error:
                raise OutputError(
                    f"output: {self.root} cannot create a file in one step ({error.strerror})",
                    "choose a disk with hard links, or object storage",
                ) from error
            try:
                os.link(temporary, target)
            except FileExistsError:
                return
            raise OutputError(f"output: {self.root} creates the same file twice")

    def sweep(self) -> None:
        """See :meth:`Store.sweep`."""
        with border(Role.OUTPUT, str(self.root)):
            for parent, _, names in os.walk(self.root):
                for name in names:
                    if name.startswith(_TEMPORARY):
                        (Path(parent) / name).unlink(missing_ok=True)

    def _path(self, path: str) -> Path:
        return self.root / check_path(path, Role.OUTPUT)

    def _describe(self, target: Path) -> Iterator[ObjectInfo]:
        try:
            status = target.stat()
        except (FileNotFoundError, NotADirectoryError):
            return
        if stat.S_ISREG(status.st_mode):
            path = target.relative_to(self.root).as_posix()
            yield ObjectInfo(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")

    @contextmanager
    def _written(self, target: Path, data: bytes | Path) -> Iterator[Path]:
        """A synced temporary file beside ``target`` with ``data``; removed at the end."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(self.root.resolve()):
            raise StorageError(f"output: {target} leads out of {self.root} by a link")
        temporary = target.parent / f"{_TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("xb") as sink:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        while chunk := source.read(_COPY_BYTES):
                            sink.write(chunk)
                else:
                    sink.write(data)
                sink.flush()
                os.fsync(sink.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _replace(temporary: Path, target: Path) -> None:
    """Put a written file in the place of another. Unlike a create it is not tried again when the
    file was swept away meanwhile: whoever swept holds the output now."""
    try:
        os.replace(temporary, target)
    except FileNotFoundError as error:
        raise StorageError(
            f"output: {target} was not written: another driver took this one for dead",
            "submit again to resume",
        ) from error
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some network disks cannot sync a folder; their names are durable by themselves.
        pass
    finally:
        os.close(handle)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error
