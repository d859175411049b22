"""Bringing checkpoints to this machine."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest

from batchrun.data import checkpoints
from batchrun.data.checkpoints import fetch
from batchrun.data.store import Store
from batchrun.errors import CheckpointError
from tests.conftest import S3Server

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 5000,
    "chat_template.jinja": b"{{ messages }}",
    "vocab.txt": b"a",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHRUN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def remote(s3_server: S3Server) -> Store:
    """A checkpoint on S3, with files that nobody may fetch."""
    store = Store.open(f"{s3_server.url}/models/m", s3_server.storage_options)
    for name, data in FILES.items():
        store.put(name, data)
    for name in ("modeling.py", "weights.bin", "model.pt", "x.pkl", "README.md", "sub/config.json"):
        store.put(name, b"no")
    return store


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    """Nothing is copied."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert folder == fetch(str(folder)) == fetch(f"file://{folder}")


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "does not exist"), ("file", "is not a folder"), ("empty", "has no config.json")],
)
def test_what_is_no_checkpoint_is_told(tmp_path: Path, name: str, message: str) -> None:
    """Exit 2 with what a checkpoint is."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(str(tmp_path / name))
    assert caught.value.hint


def test_a_remote_checkpoint_is_downloaded_once(remote: Store, s3_server: S3Server) -> None:
    """Its own kinds of files alone, with their checksums, and the second call takes the cache."""
    options = s3_server.storage_options
    folder = fetch(remote.url, options)
    record = json.loads((folder / "batchrun-files.json").read_text())
    assert {*FILES, "batchrun-files.json"} == {path.name for path in folder.iterdir()}
    for name, data in FILES.items():
        assert data == (folder / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record[name]["sha256"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder == fetch(remote.url + "/", options)
    assert before == (folder / "model.safetensors").stat().st_mtime_ns


def test_a_damaged_cache_is_downloaded_again(remote: Store, s3_server: S3Server) -> None:
    """A file cut short on disk does not come back to life."""
    folder = fetch(remote.url, s3_server.storage_options)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert folder == fetch(remote.url, s3_server.storage_options)
    assert FILES["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_changed_checkpoint_is_another_one(remote: Store, s3_server: S3Server) -> None:
    """A running worker keeps the files it began with."""
    old = fetch(remote.url, s3_server.storage_options)
    remote.put("config.json", b'{"changed": 1}')
    new = fetch(remote.url, s3_server.storage_options)
    assert old != new
    assert (
        (old / "config.json").read_bytes(),
        (new / "config.json").read_bytes(),
    ) == (b"{}", b'{"changed": 1}')


def test_a_download_that_breaks_leaves_nothing_in_place(
    remote: Store, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cache holds whole checkpoints only, and the next call begins anew."""
    copy = checkpoints._copy
    monkeypatch.setattr(checkpoints, "_copy", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError.__base__):  # type: ignore[arg-type]
        fetch(remote.url, s3_server.storage_options)
    assert not [path for path in (tmp_path / "cache/checkpoints").iterdir() if not path.suffix]
    monkeypatch.setattr(checkpoints, "_copy", copy)
    assert (fetch(remote.url, s3_server.storage_options) / "config.json").is_file()


def _fetch(url: str, options: dict[str, object]) -> str:
    return str(fetch(url, options))


def test_workers_that_start_together_share_one_download(remote: Store, s3_server: S3Server) -> None:
    """Processes wait for the one that is first and find its files."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        calls = [(remote.url, s3_server.storage_options)] * 2
        first, second = pool.starmap(_fetch, calls)
    assert first == second
    assert FILES["model.safetensors"] == (Path(first) / "model.safetensors").read_bytes()


def test_a_remote_folder_without_config_is_told(s3_server: S3Server) -> None:
    """Also one that does not exist, and a bucket that does not."""
    options = s3_server.storage_options
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        fetch(f"{s3_server.url}/none", options)
    with pytest.raises(CheckpointError, match="bucket of s3://no-such-bucket-y"):
        fetch("s3://no-such-bucket-y/m", options)
