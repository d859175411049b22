"""What every store promises, on local disk and on an S3 server."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from batchrun.data.store import Store
from batchrun.errors import OutputError

ODD_PATHS = (
    "plain.txt",
    "with space.txt",
    "percent%20.txt",
    "hash#1.txt",
    "question?.txt",
    "plus+and&.txt",
    "brackets[1].txt",
    "star*.txt",
    "ünïcödé-漢字-😀.txt",
    "deep/er/still.txt",
)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of either kind."""
    if request.param == "local":
        return Store.open(str(tmp_path / "out"))
    server = request.getfixturevalue("s3_server")
    return Store.open(f"{server.url}/a/prefix", server.storage_options)


def test_what_was_put_is_listed_and_read(store: Store) -> None:
    """Every object comes back under its own name, byte for byte, whatever its name."""
    for path in ODD_PATHS:
        store.put(path, path.encode())
    listed = store.list()
    assert sorted(ODD_PATHS) == [item.path for item in listed]
    assert [len(path.encode()) for path in sorted(ODD_PATHS)] == [
        item.size_bytes for item in listed
    ]
    for item in listed:
        assert item.path.encode() == store.read(item.path)
        assert item == store.info(item.path)
        with store.open_file(item.path) as source:
            source.seek(1)
            assert item.path.encode()[1:] == source.read()


def test_listing_one_level_and_folders(store: Store) -> None:
    """A listing that is not recursive shows this level alone; folders are named."""
    for path in ("b.txt", "a.txt", "x/1.txt", "y/2/3.txt"):
        store.put(path, b"")
    assert tuple(item.path for item in store.list(recursive=False)) == ("a.txt", "b.txt")
    assert tuple(item.path for item in store.list("y")) == ("y/2/3.txt",)
    assert store.folders("y") == ("2",)
    assert store.folders("none") == ()


def test_absent_objects_are_no_errors(store: Store) -> None:
    """Nothing is there before anything is put: empty, None, and deleting is fine."""
    assert store.list() == ()
    assert store.list("some/where") == ()
    assert store.read("none") is None
    assert store.info("none") is None
    store.delete(["none", "no/ne"])


def test_put_replaces_and_changes_the_fingerprint(store: Store) -> None:
    """An overwrite is seen at once by the next read and listing."""
    store.put("x", b"one")
    before = store.info("x")
    store.put("x", b"other")
    after = store.info("x")
    assert store.read("x") == b"other"
    assert before is not None and after is not None
    assert before.fingerprint != after.fingerprint


def test_an_object_is_created_once(store: Store, tmp_path: Path) -> None:
    """The first create wins, the second is told so and changes nothing."""
    body = tmp_path / "body"
    body.write_bytes(b"first")
    assert store.put_if_absent("part", body, "token-1") is True
    assert store.put_if_absent("part", b"second", "token-2") is False
    assert store.read("part") == b"first"
    assert tuple(item.path for item in store.list()) == ("part",)


@pytest.mark.parametrize("round_", range(4))
def test_of_many_creators_exactly_one_wins(store: Store, round_: int) -> None:
    """Eight writers at once: one is told that it won, and its bytes are there."""
    gate = threading.Barrier(8)

    def create(number: int) -> bool:
        gate.wait()
        return store.put_if_absent(f"race-{round_}", f"{number}".encode(), f"token-{number}")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(create, range(8)))
    assert sum(answers) == 1
    assert str(answers.index(True)).encode() == store.read(f"race-{round_}")


def test_large_files_are_published_whole(store: Store, tmp_path: Path) -> None:
    """A body of many megabytes arrives byte for byte."""
    body = tmp_path / "body"
    body.write_bytes(bytes(range(256)) * (10 << 12))
    assert store.put_if_absent("big", body, "token") is True
    assert body.read_bytes() == store.read("big")


def test_delete_removes_what_is_named(store: Store) -> None:
    """Deleted objects are gone, their neighbours are not."""
    for path in ("keep/1", "drop/2", "drop/3"):
        store.put(path, b"")
    store.delete(["drop/2", "drop/3"])
    assert tuple(item.path for item in store.list()) == ("keep/1",)


@pytest.mark.parametrize(
    "path", ["", "..", "../x", "a/../../x", "/etc/x", "a//b", "a/./b", "a\0b", "a\nb", "a/"]
)
def test_hostile_paths_are_refused(store: Store, path: str) -> None:
    """No path leads out of the root."""
    with pytest.raises(OutputError, match="not a path inside"):
        store.put(path, b"")
    with pytest.raises(OutputError, match="not a path inside"):
        store.put_if_absent(path, b"", "token")
    assert store.list() == ()


def test_probe_proves_the_root_and_leaves_nothing(store: Store) -> None:
    """A good root passes, and the probe is not seen afterwards."""
    store.probe()
    assert store.list() == ()


@pytest.mark.parametrize("url", ["http://host/x", "ftp://host/x", "memory://x", "hdfs://h/x"])
def test_schemes_without_atomic_create_are_refused(url: str) -> None:
    """An output elsewhere than on disk, S3 or GCS is an error that names what can be used."""
    with pytest.raises(OutputError, match="no atomic create") as caught:
        Store.open(url)
    assert "s3://" in caught.value.hint
