"""What befalls object storage: answers lost and late, refusals, outages, a full disk, strangers."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.errors import JobError, StorageError
from tests.chaos.conftest import Field, Rows, meanwhile, wait_for
from tests.chaos.proxy import EXPIRED, SLOW_DOWN, Answer, Proxy, first, proxied
from tests.conftest import S3Server
from tests.integration.conftest import Work
from tests.radosgw import missing_tools, radosgw

PART = r"/part-\d+"
JOURNAL = r"/journal/"


@pytest.fixture
def proxy(s3_process: str) -> Iterator[Proxy]:
    """A proxy in front of this session's S3 server."""
    with proxied(s3_process) as made:
        yield made


@pytest.fixture
def behind(field: Field, proxy: Proxy, s3_server: S3Server) -> Field:
    """The field with outputs in S3, which runs see through the proxy."""
    made = field.at(s3_server.url, {"endpoint_url": proxy.endpoint_url})
    made.faulted_at = None
    return made


@pytest.mark.fault(4, "first answers to puts of parts and journals lost")
def test_lost_answers(behind: Field, proxy: Proxy, expected: Rows) -> None:
    """What landed without an answer is recognised as our own."""
    losers = (first(2, PART), first(2, JOURNAL), first(1, "/parts/"))
    proxy.lose = lambda verb, path: any(lose(verb, path) for lose in losers)
    behind.plan("lost")
    summary = behind.run("lost")
    assert (summary.exit_code, summary.restarts, summary.failed_shards) == (0, 0, {})
    proxy.lose = lambda verb, path: False
    behind.check("lost", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(5, "five answers in a row lost to each put of a part")
def test_all_answers_lost(behind: Field, proxy: Proxy, expected: Rows) -> None:
    """As long as storage can be asked whose object it is, nothing else is needed."""
    proxy.lose = first(20, PART)
    behind.plan("all")
    summary = behind.run("all")
    assert (summary.exit_code, summary.restarts, summary.failed_shards) == (0, 0, {})
    behind.check("all", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(6, "a put of a part arrives when the run has ended")
def test_a_put_that_is_late(behind: Field, proxy: Proxy, expected: Rows) -> None:
    """The late twin is refused by the store; one object stands."""
    proxy.hold = first(2, PART)
    behind.plan("late")
    summary = behind.run("late")
    assert summary.exit_code == 0
    assert proxy.release() == [412, 412]
    behind.check("late", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(9, "storage cannot be reached for eight seconds")
def test_a_partition(behind: Field, proxy: Proxy, expected: Rows) -> None:
    """The run waits and goes on."""
    behind.plan("away")

    def cut(ended: threading.Event) -> None:
        if wait_for(lambda: behind.sampled("away") > 300, ended):
            behind.fault()
            proxy.is_down = True
            ended.wait(8)
            proxy.is_down = False

    with meanwhile(cut):
        summary = behind.run("away")
    proxy.is_down = False
    assert (summary.exit_code, summary.restarts) == (0, 0)
    behind.check("away", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(27, "one request in three is told to slow down")
def test_a_storm(behind: Field, proxy: Proxy, expected: Rows) -> None:
    """Slower, nothing else; and not more than twice the requests."""
    behind.plan("calm")
    assert behind.run("calm").exit_code == 0
    nominal = len(proxy.requests)
    proxy.requests.clear()
    count = [0]
    lock = threading.Lock()

    def refuse(verb: str, path: str) -> Answer | None:
        with lock:
            count[0] += 1
            return SLOW_DOWN if count[0] % 3 == 0 else None

    proxy.refuse = refuse
    behind.plan("throttled")
    summary = behind.run("throttled")
    proxy.refuse = lambda verb, path: None
    assert (summary.exit_code, summary.restarts) == (0, 0)
    # A run that takes longer asks a little more often, for progress and the lock's beat.
    assert len(proxy.requests) <= 2 * nominal + 2 * summary.elapsed_s
    behind.check("throttled", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(28, "credentials expire in the middle of a run")
def test_expired_credentials(behind: Field, proxy: Proxy, expected: Rows) -> None:
    """The run ends with exit code 75, and with others the next submit goes on."""
    behind.plan("expired")

    def expire(ended: threading.Event) -> None:
        if wait_for(lambda: behind.sampled("expired") > 400, ended):
            behind.fault()
            proxy.refuse = lambda verb, path: EXPIRED

    started = time.monotonic()
    with meanwhile(expire):
        with pytest.raises(StorageError) as caught:
            behind.run("expired")
    assert caught.value.exit_code == 75 and time.monotonic() - started < 60
    proxy.refuse = lambda verb, path: None
    summary = behind.run("expired")
    assert summary.exit_code == 0
    behind.check("expired", expected, losses=4)


@pytest.mark.chaos
@pytest.mark.fault(29, "reads of the input are cut off in the middle")
def test_short_reads(behind: Field, proxy: Proxy, s3_server: S3Server) -> None:
    """A range that came short is read again, of the same object: the rows are those of a run whose
    reads were whole. The model is real, as plans of faults lie beside input on a disk."""
    store = behind.at(s3_server.url, behind.storage_options).store("in")
    for path in sorted((behind.work.folder / "in").glob("*.parquet")):
        store.put(path.name, path.read_bytes())
    source = {"path": f"{s3_server.url}/in", "storage_options": behind.storage_options}
    assert behind.run("whole-reads", input=source).exit_code == 0
    num_cut = [0]
    cutter = first(6, r"/in/.*\.parquet", "GET")

    def cut(verb: str, path: str) -> int | None:
        if not cutter(verb, path):
            return None
        num_cut[0] += 1
        return 100

    proxy.cut = cut
    summary = behind.run("short-reads", input=source)
    assert (summary.exit_code, summary.failed_shards, num_cut) == (0, {}, [6])
    assert behind.rows("short-reads") == behind.rows("whole-reads") != []
    behind.record("lost", 0)
    behind.record("twice", 0)


@pytest.mark.fault(36, "the store ignores If-None-Match")
def test_a_store_without_create(behind: Field, proxy: Proxy) -> None:
    """Such a store is refused before anything is written."""
    proxy.drop_header = "If-None-Match"
    behind.plan("ignored")
    with pytest.raises(JobError, match="ignores create-only puts"):
        behind.run("ignored")
    assert behind.store("ignored").list() == ()


@pytest.mark.chaos
@pytest.mark.fault(9, "the S3 gateway is killed and started again")
@pytest.mark.skipif(bool(missing_tools()), reason="Ceph is not installed")
def test_an_outage_of_a_real_gateway(
    field: Field, tmp_path: Path, expected: Rows, s3_process: str
) -> None:
    """The run outlives Ceph's gateway, whose data stays."""
    import s3fs

    with radosgw(tmp_path / "ceph") as gateway:
        s3fs.S3FileSystem(endpoint_url=gateway.endpoint_url).mkdir("outage-bucket")
        far = field.at("s3://outage-bucket", {"endpoint_url": gateway.endpoint_url})
        far.plan("outage")

        def stop(ended: threading.Event) -> None:
            if wait_for(lambda: far.sampled("outage") > 300, ended):
                far.fault()
                gateway.stop_gateway()
                ended.wait(6)
                gateway.start_gateway()

        with meanwhile(stop):
            summary = far.run("outage")
        assert (summary.exit_code, summary.restarts) == (0, 0)
        far.check("outage", expected, losses=0)


@pytest.mark.chaos
@pytest.mark.fault(30, "an input file is replaced while others are read")
def test_a_replaced_input(own_field: Callable[..., tuple[Field, Rows]], work: Work) -> None:
    """Its shard fails and says so; nothing of it is published; the others are done."""
    field, whole = own_field([[f"first {n}" for n in range(20)], ["second 1", "second 2"]])
    field.plan("replaced", engine={"step_s": 0.1, "max_sequences": 1})

    def replace(ended: threading.Event) -> None:
        if wait_for(lambda: field.sampled("replaced") > 20, ended):
            field.fault()
            work.write("1", ["another", "file", "altogether"])

    with meanwhile(replace):
        summary = field.run("replaced", generation={"max_tokens": 4})
    assert summary.exit_code == 3
    assert len(summary.failed_shards) == 1
    assert "1.parquet" in next(iter(summary.failed_shards))
    rows = [(row["id"], str(row["completion"]).split()) for row in field.rows("replaced")]
    assert rows == [(row["id"], str(row["completion"]).split()[:4]) for row in whole[:20]]
    field.record("lost", 0)
    field.record("twice", 0)


@pytest.mark.fault(37, "somebody else's object has the name of a part")
def test_a_foreign_object(field: Field, expected: Rows) -> None:
    """It stays as it is, and its shard fails; without it the next submit does the rest."""
    field.plan("foreign", engine={"step_s": 0.0})
    other = field.rows  # the names of parts do not depend on the output
    assert other("undisturbed") == expected
    names = [item.path for item in field.store("undisturbed").list(recursive=False)]
    name = next(item for item in names if item.startswith("part-000001"))
    path = field.work.folder / "foreign" / name

    def plant(ended: threading.Event) -> None:
        plan = field.work.folder / "foreign" / "_batchrun"
        if wait_for(lambda: list(plan.glob("*/plan-0001.parquet")), ended, every_s=0.001):
            path.write_bytes(b"mine")

    with meanwhile(plant):
        summary = field.run("foreign")
    assert (summary.exit_code, len(summary.failed_shards)) == (3, 1)
    assert path.read_bytes() == b"mine"
    path.unlink()
    assert field.run("foreign").exit_code == 0
    field.check("foreign", expected, losses=SHARD_AGAIN)


SHARD_AGAIN = 4  # a shard that failed is generated anew


@pytest.mark.chaos
@pytest.mark.fault(33, "the output's disk is full")
def test_a_full_disk(field: Field, expected: Rows, tmp_path: Path) -> None:
    """The run ends with exit code 75, half a part is never seen, and with room it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs to mount a file system")
    try:
        small = field.at(str(disk), {})
        small.plan("full")

        def fill(ended: threading.Event) -> None:
            if wait_for(lambda: small.sampled("full") > 400, ended):
                small.fault()
                with (disk / "filler").open("wb", buffering=0) as filler:
                    try:
                        while True:
                            filler.write(bytes(4096))
                    except OSError:
                        return

        with meanwhile(fill):
            with pytest.raises(StorageError) as caught:
                small.run("full")
        assert caught.value.exit_code == 75 and "space" in caught.value.message
        for path in (disk / "full").glob("part-*.parquet"):
            pq.read_metadata(path)
        (disk / "filler").unlink()
        assert small.run("full").exit_code == 0
        small.check("full", expected, losses=4)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
