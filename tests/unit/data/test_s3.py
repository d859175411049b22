"""What can go wrong between us and S3, and what is made of it."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from batchrun.data import paced, remote
from batchrun.data.inputs import InputColumns
from batchrun.data.s3 import S3Store
from batchrun.data.store import Store
from batchrun.data.traffic import Outcome, traffic
from batchrun.errors import OutputError, StorageError
from batchrun.metrics import Recorder
from tests.conftest import S3Server
from tests.unit.data.parquet import planned, prompts, read_all, write


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(paced, "_FIRST_WAIT_S", 0.001)


class FaultyS3Store(S3Store):
    """An S3 store whose creates go wrong as scripted: ``before`` or ``after`` they take effect."""

    def __init__(self, server: S3Server, faults: list[str]) -> None:
        super().__init__(server.url, server.storage_options)
        self.faults = faults
        self.num_creates = 0

    def _create(self, key: str, data: bytes | Path, metadata: Mapping[str, str]) -> None:
        self.num_creates += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "before":
            raise ConnectionResetError("the request was lost")
        super()._create(key, data, metadata)
        if fault == "after":
            raise ConnectionResetError("the answer was lost")


def test_a_lost_answer_is_read_back_as_ours(s3_server: S3Server) -> None:
    """The object landed, the answer did not: it is ours, and is not sent again."""
    store = FaultyS3Store(s3_server, ["after"])
    assert store.put_if_absent("part", b"mine", "token-1") is True
    assert store.num_creates == 1


def test_a_lost_request_is_sent_again(s3_server: S3Server) -> None:
    """Nothing landed: the same create goes out again and is ours."""
    store = FaultyS3Store(s3_server, ["before", "before", "after"])
    assert store.put_if_absent("part", b"mine", "token-1") is True
    assert store.num_creates == 3
    assert store.read("part") == b"mine"


def test_a_repeat_of_our_own_put_is_ours(s3_server: S3Server) -> None:
    """412 against our own object, as after an SDK's silent retry, is success."""
    store = FaultyS3Store(s3_server, [])
    assert store.put_if_absent("part", b"mine", "token-1") is True
    assert store.put_if_absent("part", b"mine", "token-1") is True


def test_equal_bytes_are_no_proof_of_authorship(s3_server: S3Server) -> None:
    """Another token's object is another's, also with the same content and a lost answer."""
    assert FaultyS3Store(s3_server, []).put_if_absent("part", b"same", "token-1") is True
    store = FaultyS3Store(s3_server, ["before"])
    assert store.put_if_absent("part", b"same", "token-2") is False


def test_an_object_without_token_is_anothers(s3_server: S3Server) -> None:
    """A foreign object under the name is neither ours nor touched."""
    store = FaultyS3Store(s3_server, [])
    store.put("part", b"foreign")
    assert store.put_if_absent("part", b"mine", "token-1") is False
    assert store.read("part") == b"foreign"


def test_storage_that_stays_away_is_a_storage_error(s3_server: S3Server) -> None:
    """After the last try the outcome is unknown, and the error says so with exit code 75."""
    store = FaultyS3Store(s3_server, ["before"] * 100)
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        store.put_if_absent("part", b"mine", "token-1")
    assert caught.value.exit_code == 75


def test_a_delete_that_is_refused_for_one_object_is_no_success(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service answers 200 and says in its text which objects are still there: those are tried
    again, or an error says that they may not be deleted."""
    store = S3Store(s3_server.url, s3_server.storage_options)
    for name in ("a", "b"):
        store.put(name, b"")
    answers = ["InternalError", "SlowDown"]
    call = store._fs.call_s3

    def refusing(method: str, **request: Any) -> Any:
        if method != "delete_objects" or not answers:
            return call(method, **request)
        first, *others = request["Delete"]["Objects"]
        answer = call(method, Bucket=request["Bucket"], Delete={"Objects": others})
        return {**answer, "Errors": [{**first, "Code": answers.pop(0), "Message": "so it is"}]}

    monkeypatch.setattr(store._fs, "call_s3", refusing)
    store.delete(["a", "b"])
    assert (store.list(), answers) == ((), [])
    answers.append("AccessDenied")
    store.put("a", b"")
    store.put("b", b"")
    with pytest.raises(StorageError, match=r"is denied \(AccessDenied: so it is\)"):
        store.delete(["a", "b"])
    assert [item.path for item in store.list()] == ["a"]


def test_a_part_is_one_single_put(s3_server: S3Server, tmp_path: Path) -> None:
    """A big part is not uploaded in pieces, whose completion need not be create-only."""
    body = tmp_path / "body"
    body.write_bytes(b"x" * (12 << 20))
    store = Store.open(s3_server.url, s3_server.storage_options)
    assert store.put_if_absent("part", body, "token")
    found = store.info("part")
    assert found is not None
    assert (found.size_bytes, "-" in found.fingerprint) == (12 << 20, False)


def test_a_store_that_ignores_the_condition_is_refused(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe finds out that creates overwrite, before a run relies on them."""
    store = S3Store(s3_server.url, s3_server.storage_options)
    send = store._writer.call_s3

    def unconditional(method: str, **request: Any) -> Any:
        request.pop("IfNoneMatch", None)
        return send(method, **request)

    monkeypatch.setattr(store._writer, "call_s3", unconditional)
    with pytest.raises(OutputError, match="ignores create-only"):
        store.probe()
    assert store.list() == ()


def test_a_missing_bucket_is_named(s3_server: S3Server) -> None:
    """Probing a bucket that does not exist says just that, with exit code 2."""
    store = Store.open("s3://no-such-bucket-here/x", s3_server.storage_options)
    with pytest.raises(OutputError, match="bucket of s3://no-such-bucket-here") as caught:
        store.probe()
    assert "create the bucket" in caught.value.hint
    with pytest.raises(OutputError, match="bucket of s3://no-such-bucket-here/x does"):
        store.list()
    with pytest.raises(OutputError, match="bucket of s3://no-such-bucket-here/x/_batchrun does"):
        store.list("_batchrun/")


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3:///x"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    """A URL that names no bucket is an error that says so, and nothing of a library."""
    with pytest.raises(OutputError, match="names no bucket"):
        Store.open(url)


@dataclass
class Scripted:
    """A server that answers every request with one S3 error."""

    status: int
    code: str
    requests: list[str] = field(default_factory=list)
    endpoint_url: str = ""


@pytest.fixture
def scripted(request: pytest.FixtureRequest, s3_process: str) -> Iterator[Scripted]:
    """A server that refuses everything as the test's parameter says."""
    script = Scripted(*request.param)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # answers Expect: 100-continue, which S3 clients send

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.requests.append(self.command)
            body = f"<Error><Code>{script.code}</Code><Message>no</Message></Error>".encode()
            self.send_response(script.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    script.endpoint_url = f"http://127.0.0.1:{server.server_port}"
    yield script
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "scripted",
    [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch")],
    indirect=True,
)
def test_refused_credentials_end_at_once(scripted: Scripted) -> None:
    """401/403 is no storm of retries: exit 2 before a run, exit 75 in the middle of one."""
    store = Store.open("s3://bucket/x", {"endpoint_url": scripted.endpoint_url})
    with pytest.raises(OutputError, match="access to s3://bucket/x is denied") as early:
        store.probe()
    assert "AWS_ACCESS_KEY_ID" in early.value.hint
    scripted.requests.clear()
    with pytest.raises(StorageError, match="denied"):
        store.put_if_absent("part", b"mine", "token")
    with pytest.raises(StorageError, match="denied"):
        store.read("part")
    assert len(scripted.requests) == 2


@pytest.mark.parametrize(
    ("scripted", "outcome"),
    [
        ((503, "SlowDown"), Outcome.THROTTLED),
        ((429, "TooManyRequests"), Outcome.THROTTLED),
        ((500, "InternalError"), Outcome.FAILED),
    ],
    indirect=["scripted"],
)
def test_throttling_is_waited_out(scripted: Scripted, outcome: Outcome) -> None:
    """It is tried again for a while, nobody multiplies the tries, and then storage is lost."""
    store = S3Store("s3://bucket/x", {"endpoint_url": scripted.endpoint_url})
    traffic().record(Recorder())  # what other tests did
    with pytest.raises(StorageError, match="cannot be reached"):
        store.read("x")
    assert len(scripted.requests) == 8
    recorder = Recorder()
    traffic().record(recorder)
    counted = {key[1]: value for key, value in recorder.take().counters.items()}
    assert counted == {("head", outcome.value): 8}
    pace = traffic().pace(scripted.endpoint_url)
    assert (pace.rate < 300) is (outcome is Outcome.THROTTLED)


class StormProxy:
    """Forwards to the S3 server, and refuses or denies some requests first, as scripted."""

    def __init__(self, target: str) -> None:
        self.target = target.removeprefix("http://")
        self.refuse: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
        self.requests: list[tuple[str, str, int]] = []
        self.endpoint_url = ""

    def serve(self) -> ThreadingHTTPServer:
        """The server, not yet running."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                refused = proxy.refuse(self.command, self.path)
                if refused is None:
                    there = http.client.HTTPConnection(proxy.target, timeout=20)
                    there.request(self.command, self.path, body, dict(self.headers))
                    found = there.getresponse()
                    status, data = found.status, found.read()
                    headers = [
                        item for item in found.getheaders() if item[0].lower() not in _OF_A_HOP
                    ]
                    size = found.getheader("Content-Length") or str(len(data))
                    there.close()
                else:
                    status, headers = refused[0], []
                    data = f"<Error><Code>{refused[1]}</Code></Error>".encode()
                    size = str(len(data))
                proxy.requests.append((self.command, self.path, status))
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", size)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{server.server_port}"
        return server


_OF_A_HOP = {"content-length", "connection", "date", "server", "transfer-encoding"}


@pytest.fixture
def storm(s3_server: S3Server) -> Iterator[StormProxy]:
    """A proxy in front of the S3 server."""
    proxy = StormProxy(s3_server.endpoint_url)
    server = proxy.serve()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield proxy
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_storm_of_refusals_is_no_storm_of_requests(
    storm: StormProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    """With three of ten requests refused, everything arrives once, with less than twice the
    requests of a quiet day."""

    def work(prefix: str) -> int:
        before = len(storm.requests)
        store = Store.open(f"{s3_server.url}/{prefix}", {"endpoint_url": storm.endpoint_url})
        body = tmp_path / "body"
        body.write_bytes(b"x" * 100_000)
        for number in range(12):
            assert store.put_if_absent(f"part-{number}", body, f"token-{number}")
            assert store.read(f"part-{number}") == b"x" * 100_000
            store.put("progress", str(number).encode())
        assert len(store.list()) == 13
        store.delete(item.path for item in store.list())
        return len(storm.requests) - before

    nominal = work("quiet")
    dice = random.Random(7)
    storm.refuse = lambda *_: (503, "SlowDown") if dice.random() < 0.3 else None
    stormy = work("storm")
    assert nominal < stormy <= 2 * nominal
    assert traffic().pace(storm.endpoint_url).rate < 500


def test_a_run_may_begin_in_a_storm(storm: StormProxy, s3_server: S3Server) -> None:
    """The probe waits out what passes, and still proves that a create happens once."""
    refused = iter([False, True] * 6)
    storm.refuse = lambda method, path: (
        (503, "SlowDown") if method == "PUT" and next(refused, False) else None
    )
    Store.open(f"{s3_server.url}/out", {"endpoint_url": storm.endpoint_url}).probe()
    statuses = [status for method, _, status in storm.requests if method == "PUT"]
    assert statuses.count(503) == 6 and statuses.count(200) == 1


def test_an_odd_denial_of_a_known_object_is_tried_again(
    storm: StormProxy, s3_server: S3Server
) -> None:
    """A 403 of an object that was there a moment ago may pass; one that stays is an error, and
    one of an object that was never seen is so at once."""
    store = Store.open(f"{s3_server.url}/x", {"endpoint_url": storm.endpoint_url})
    store.put("known", b"data")
    denials = iter([(403, "AccessDenied")] * 2)
    storm.refuse = lambda *_: next(denials, None)
    assert store.read("known") == b"data"
    storm.refuse = lambda *_: (403, "AccessDenied")
    for path, tries in (("known", 4), ("other", 1)):
        storm.requests.clear()
        with pytest.raises(StorageError, match="denied"):
            store.read(path)
        assert len(storm.requests) == tries
    storm.refuse = lambda *_: (403, "ExpiredToken")
    storm.requests.clear()
    with pytest.raises(StorageError, match="denied"):
        store.put("known", b"new")
    assert len(storm.requests) == 1, "credentials that ran out do not come back by asking"


def test_input_is_read_through_a_storm(
    storm: StormProxy, s3_server: S3Server, tmp_path: Path
) -> None:
    """Listing, footers and row groups survive refusals too, without the libraries' own retries."""
    path = write(tmp_path / "a.parquet", prompts(500), row_group_size=100)
    store = Store.open(f"{s3_server.url}/in", s3_server.storage_options)
    for number in range(3):
        store.put(f"{number}.parquet", path.read_bytes())
    dice = random.Random(3)
    storm.refuse = lambda *_: (503, "SlowDown") if dice.random() < 0.3 else None
    columns = InputColumns(prompt="prompt")
    options = {"endpoint_url": storm.endpoint_url}
    shards, schema, _ = planned(f"{s3_server.url}/in", columns, storage_options=options)
    for shard in shards:
        rows, _ = read_all(shard, schema, options)
        assert [row.values["prompt"] for row in rows] == prompts(500)["prompt"]
    assert any(status == 503 for _, _, status in storm.requests)


def test_an_endpoint_that_is_away_is_a_storage_error(
    s3_process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection is exit 75: nothing is wrong with the job."""
    monkeypatch.setattr(paced, "_MAX_TRIES", 1)
    store = Store.open("s3://bucket/x", {"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(StorageError, match="cannot be reached"):
        store.read("x")


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254",
        "http://169.254.170.2/creds",
        "http://[::ffff:a9fe:a9fe]",
        "http://[fe80::1]:80",
        "169.254.169.254:80",
    ],
)
def test_link_local_endpoints_are_refused(endpoint: str) -> None:
    """A job cannot make us talk to a cloud's metadata service."""
    for options in ({"endpoint_url": endpoint}, {"client_kwargs": {"endpoint_url": endpoint}}):
        with pytest.raises(OutputError, match="link-local"):
            Store.open("s3://bucket/x", options)


def test_an_empty_endpoint_counts_as_not_given(s3_process: str) -> None:
    """`${S3_ENDPOINT:-}` may be left unset."""
    store = S3Store("s3://bucket/x", {"endpoint_url": ""})
    assert store._fs.endpoint_url is None


def test_credentials_in_a_url_are_refused() -> None:
    """A URL with a password is refused, and the message does not repeat it."""
    with pytest.raises(OutputError, match="user name or password") as caught:
        Store.open("s3://AKIAABCDEFGHIJKLMNOP:secret@bucket/x")
    assert "secret" not in str(caught.value) and "AKIA" not in str(caught.value)


def test_stores_share_their_connections(s3_process: str) -> None:
    """Opening a store for every part costs no new client, and creates keep one of their own."""
    options = {"endpoint_url": s3_process}
    first, second = S3Store("s3://bucket/x", options), S3Store("s3://bucket/y", options)
    assert first._fs is second._fs and first._writer is second._writer
    assert first._fs is not first._writer
    assert (first._fs.retries, first._writer.retries) == (3, 1)
    assert (first._fs.patient, first._writer.patient) == (True, False)
