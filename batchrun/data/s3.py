"""Objects in S3 and in services that speak its language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchrun.data.border import Fault, Role, classify, filesystem
from batchrun.data.remote import NotLandedError, RemoteStore


class S3Store(RemoteStore):
    """A prefix of an S3 bucket.

    Creating is one single ``PutObject`` with ``If-None-Match: *``, sent through s3fs' client.
    Its file interface is not used for it: above its block size it turns to multipart uploads,
    whose completion is not create-only on every server.
    """

    _is_patient = True

    def __init__(self, url: str, storage_options: Mapping[str, object] | None) -> None:
        super().__init__(url, storage_options)
        # s3fs would send a body that it has read already once more, empty; so creates go through
        # a client of their own that does not repeat itself. Its name keeps the two apart in
        # fsspec's cache of instances.
        options = dict(storage_options or {})
        settings = options.get("config_kwargs")
        named = {"user_agent_extra": "batchrun-create"}
        options["config_kwargs"] = {**(settings if isinstance(settings, Mapping) else {}), **named}
        writer, _ = filesystem(self.url, options, Role.OUTPUT)
        writer.retries = 1
        writer.patient = False
        self._writer: Any = writer

    def _create(self, key: str, data: bytes | Path, metadata: Mapping[str, str]) -> None:
        bucket, _, name = key.partition("/")
        request = {"Bucket": bucket, "Key": name, "IfNoneMatch": "*", "Metadata": dict(metadata)}
        if isinstance(data, Path):
            with data.open("rb") as body:
                self._writer.call_s3("put_object", Body=body, **request)
        else:
            self._writer.call_s3("put_object", Body=data, **request)

    def _token(self, key: str) -> str | None:
        bucket, _, name = key.partition("/")
        try:
            head = self._fs.call_s3("head_object", Bucket=bucket, Key=name)
        except Exception as error:
            if classify(error) is Fault.ABSENT:
                return None
            raise
        return str(head.get("Metadata", {}).get("batchrun-token", ""))

    def _copy(self, source: str, target: str) -> None:
        (from_bucket, _, from_name), (bucket, _, name) = (
            source.partition("/"),
            target.partition("/"),
        )
        place = {"Bucket": from_bucket, "Key": from_name}
        self._fs.call_s3("copy_object", Bucket=bucket, Key=name, CopySource=place)

    def _delete(self, keys: Sequence[str]) -> None:
        bucket = self.bucket
        names = [{"Key": key.partition("/")[2]} for key in keys]
        if not names:
            return
        request = {"Objects": names, "Quiet": True}
        answer = self._fs.call_s3("delete_objects", Bucket=bucket, Delete=request)
        for refused in answer.get("Errors", ()):
            # The answer as a whole is a good one all the same.
            error = _RefusedError(refused)
            if classify(error) is Fault.TRANSIENT:
                raise NotLandedError(f"{refused.get('Key')} was not deleted ({error})") from error
            raise error


class _RefusedError(Exception):
    """What the service says of one of several objects; as botocore's errors to who classifies."""

    def __init__(self, refused: Mapping[str, object]) -> None:
        super().__init__(f"{refused.get('Code')}: {refused.get('Message')}")
        self.response = {"Error": dict(refused)}
