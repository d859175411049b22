"""Objects in Google Cloud Storage. Written from its documentation and not yet tried there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from batchrun.data.border import Fault, classify
from batchrun.data.remote import RemoteStore


class GcsStore(RemoteStore):
    """A prefix of a bucket of Google Cloud Storage; needs ``gcsfs``.

    ``mode="create"`` of gcsfs sends ``ifGenerationMatch=0``.
    """

    def _create(self, key: str, data: bytes | Path, metadata: Mapping[str, str]) -> None:
        body = data.read_bytes() if isinstance(data, Path) else data
        self._fs.pipe_file(key, body, metadata=dict(metadata), mode="create")

    def _token(self, key: str) -> str | None:
        try:
            found = self._fs.info(key, refresh=True)
        except Exception as error:
            if classify(error) is Fault.ABSENT:
                return None
            raise
        return str((found.get("metadata") or {}).get("batchrun-token", ""))

    def _copy(self, source: str, target: str) -> None:
        self._fs.cp_file(source, target)

    def _delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            try:
                self._fs.rm_file(key)
            except FileNotFoundError:
                continue
