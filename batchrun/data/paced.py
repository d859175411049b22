"""s3fs, with every request paced, counted, and patiently sent again where that helps.

Retries of the libraries are off, because theirs multiply and none of them slows down the others.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from typing import Any

import s3fs

from batchrun.data.traffic import Op, Outcome, Pace, traffic

# Waits between tries, in seconds: full jitter below a bound that doubles, half a minute in all.
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_MAX_TRIES = 8
_MAX_DENIED_TRIES = 4
_MAX_KNOWN = 4096

_OPS = {
    "GetObject": Op.GET,
    "PutObject": Op.PUT,
    "HeadObject": Op.HEAD,
    "HeadBucket": Op.HEAD,
    "ListObjectsV2": Op.LIST,
    "ListObjects": Op.LIST,
    "CopyObject": Op.COPY,
    "DeleteObject": Op.DELETE,
    "DeleteObjects": Op.DELETE,
}
_THROTTLED = frozenset(
    "SlowDown Throttling ThrottlingException RequestLimitExceeded TooManyRequests "
    "RequestThrottled ServiceUnavailable 503 429".split()
)
_PASSING = frozenset("InternalError RequestTimeout OperationAborted 500 502 504".split())
# Clear refusals of credentials are not among them.
_DENIED = frozenset("AccessDenied Forbidden 403".split())


class PacedS3FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]
    """Not ``patient``, it sends every request once: whoever has to know what became of it."""

    retries = 3  # of s3fs: for bodies that end too early
    patient = True

    async def get_s3(self, bucket: str | None = None) -> Any:
        """The client for a bucket, with our hooks; s3fs sends everything through it."""
        client = await super().get_s3(bucket)
        hooks = _Hooks(self, client.meta.endpoint_url)
        # Registered once a client: the emitter knows them by their names.
        events, name = client.meta.events, "batchrun-pace"
        events.register("before-send.s3", hooks.before_send, unique_id=f"{name}-before")
        events.register("needs-retry.s3", hooks.needs_retry, unique_id=f"{name}-after")
        return client


class _Hooks:
    """What happens before and after each request of one client."""

    def __init__(self, fs: PacedS3FileSystem, endpoint: str) -> None:
        self._fs = fs
        self._pace: Pace = traffic().pace(endpoint)
        self._known: OrderedDict[str, None] = OrderedDict()

    async def before_send(self, **_: Any) -> None:
        """Wait until the request may go."""
        wait_s = self._pace.take()
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def needs_retry(
        self,
        *,
        attempts: int,
        operation: Any,
        request_dict: Any,
        response: Any = None,
        caught_exception: Exception | None = None,
        **_: Any,
    ) -> float | None:
        """Seconds to wait before the request is sent again; None to take the answer."""
        key = str(request_dict.get("url", "")).partition("?")[0]
        outcome, max_tries = self._judge(key, response, caught_exception)
        traffic().count(_OPS.get(operation.name, Op.OTHER), outcome)
        if outcome is Outcome.THROTTLED:
            self._pace.slow_down()
        if not self._fs.patient or attempts >= max_tries:
            return None
        return random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempts))

    def _judge(self, key: str, response: Any, error: Exception | None) -> tuple[Outcome, int]:
        """What an answer means, and how often such a request is sent at most."""
        if error is not None or response is None:
            return Outcome.FAILED, _MAX_TRIES
        http, parsed = response
        code = str(parsed.get("Error", {}).get("Code", "")) if http.status_code >= 300 else ""
        words = {code, str(http.status_code)}
        if words & _THROTTLED:
            return Outcome.THROTTLED, _MAX_TRIES
        if words & _PASSING:
            return Outcome.FAILED, _MAX_TRIES
        if code in _DENIED:
            # Some services say so of an object that they had a moment ago, and give it later.
            return Outcome.DENIED, _MAX_DENIED_TRIES if key in self._known else 1
        if http.status_code in (401, 403):
            return Outcome.DENIED, 1
        if http.status_code < 300:
            self._known[key] = None
            self._known.move_to_end(key)
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return Outcome.OK, 1
