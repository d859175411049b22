"""Objects under one root, on local disk or in object storage, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from batchrun.data.border import Role, check_url, scheme_of


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: ``path`` relative to the store's root, and what pins its bytes.

    ``fingerprint`` is the ETag in object storage, else size and modification time. It is only
    ever compared for equality.
    """

    path: str
    size_bytes: int
    fingerprint: str


class Store(ABC):
    """A folder or prefix that can be listed, read and written.

    All paths are relative to the root and use ``/``. Every method raises
    :class:`~batchrun.errors.StorageError` when storage or credentials fail for longer than
    retries help, and :class:`~batchrun.errors.OutputError` for a hostile path.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @staticmethod
    def open(url: str, storage_options: Mapping[str, object] | None = None) -> Store:
        """The store at ``url``: a local path, ``s3://`` or ``gs://``. Does no request yet.

        Raises :class:`~batchrun.errors.OutputError` for any other scheme: a run's output needs
        an atomic create-only put.
        """
        check_url(url, Role.OUTPUT)
        match scheme_of(url):
            case "file" | "local":
                from batchrun.data.local import LocalStore

                return LocalStore(url)
            case "s3" | "s3a":
                from batchrun.data.s3 import S3Store

                return S3Store(url, storage_options)
            case "gs" | "gcs":
                from batchrun.data.gcs import GcsStore

                return GcsStore(url, storage_options)
            case scheme:
                raise Role.OUTPUT.error(
                    f"output: {scheme}:// has no atomic create, which an output needs",
                    "use a local path, s3:// or gs://",
                )

    @abstractmethod
    def list(self, folder: str = "", *, recursive: bool = True) -> tuple[ObjectInfo, ...]:
        """The objects in ``folder`` in name order; nothing when the folder does not exist."""

    @abstractmethod
    def folders(self, folder: str) -> tuple[str, ...]:
        """The names of the folders directly in ``folder``, in name order."""

    @abstractmethod
    def info(self, path: str) -> ObjectInfo | None:
        """The object at ``path``, or None."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """The bytes of the object at ``path``, or None when there is none."""

    @abstractmethod
    def open_file(self, path: str) -> BinaryIO:
        """The object at ``path`` as a seekable file that reads ranges; the caller closes it."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Create or replace the object atomically. For bookkeeping that may be lost only."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Make ``target`` what ``source`` is, in one step and without moving bytes through here.

        Replaces what is there: only for the holder of the run lock. Raises
        :class:`~batchrun.errors.OutputError` when there is no ``source``.
        """

    @abstractmethod
    def put_if_absent(
        self,
        path: str,
        data: bytes | Path,
        token: str,
        metadata: Mapping[str, str] | None = None,
    ) -> bool:
        """Create the object if there is none; True exactly when the object there is ours.

        ``data`` are bytes or a local file. ``token`` is unique to the caller's attempt and
        decides, after a lost answer, whose object it is. ``metadata`` is kept beside the object
        where the store can. An object that exists is never changed and never deleted.
        """

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """Delete the objects; those that do not exist are no error."""

    @abstractmethod
    def probe(self) -> None:
        """Prove that the root is writable and that a create-only put creates only once.

        Leaves nothing behind. Raises :class:`~batchrun.errors.OutputError` saying what fails.
        """

    def sweep(self) -> None:
        """Remove what writers that died left unfinished. Only for the holder of the run lock."""
        return None
