"""What local disks add to the promises of every store."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import pytest

from batchrun.data.local import LocalStore
from batchrun.data.store import Store
from batchrun.errors import OutputError, StorageError


def test_files_have_the_permissions_of_the_user(tmp_path: Path) -> None:
    """What is published can be read by whom the user's umask lets read."""
    old = os.umask(0o022)
    try:
        store = LocalStore(str(tmp_path))
        store.put_if_absent("part", b"x", "token")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "part").stat().st_mode) == 0o644


def test_a_link_that_worked_but_reports_failure_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network disk the answer to a link can be lost: the number of links tells."""
    link = os.link

    def lost(source: str, target: str) -> None:
        link(source, target)
        raise OSError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", lost)
    assert LocalStore(str(tmp_path)).put_if_absent("part", b"x", "token") is True


def test_what_another_driver_swept_away_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose driver was taken for dead loses its unfinished file to the next one's sweep,
    and publishes all the same."""
    store, link, swept = LocalStore(str(tmp_path)), os.link, [1]

    def late(source: str, target: str) -> None:
        if swept:
            LocalStore(str(tmp_path)).sweep()
            swept.pop()
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert store.put_if_absent("part", b"1", "mine")
    assert not store.put_if_absent("part", b"2", "another")
    assert [(item.path, store.read(item.path)) for item in store.list()] == [("part", b"1")]


def test_what_another_driver_swept_away_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that was taken for dead does not overwrite what its successor has written."""
    store, replace = LocalStore(str(tmp_path)), os.replace

    def late(source: str, target: str) -> None:
        LocalStore(str(tmp_path)).sweep()
        replace(source, target)

    store.put("progress", b"1")
    monkeypatch.setattr(os, "replace", late)
    for write in (lambda: store.put("progress", b"2"), lambda: store.copy("progress", "progress")):
        with pytest.raises(StorageError, match="another driver took this one for dead"):
            write()
    assert store.read("progress") == b"1"


def test_a_full_disk_is_a_storage_error_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space: exit 75 with the hint to make room, and no half file under any name."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        LocalStore(str(tmp_path)).put_if_absent("part", b"x", "token")
    assert (
        caught.value.exit_code,
        caught.value.hint,
    ) == (75, "make room and submit again to resume")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_hard_links_is_refused_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe says what the disk cannot do, before a run begins."""

    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OutputError, match="in one step"):
        LocalStore(str(tmp_path / "new")).probe()
    assert list(tmp_path.iterdir()) == []


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    """An output that is a file, or lies below one, is an error that names the file."""
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/out", "file/deep/out"):
        with pytest.raises(OutputError, match=f"{re.escape(str(tmp_path))}/file is a file"):
            LocalStore(str(tmp_path / place)).probe()


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs /proc as a read-only place")
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """The probe says that the output cannot be written, with exit code 2."""
    with pytest.raises(OutputError) as caught:
        LocalStore("/proc/batchrun-out").probe()
    assert caught.value.exit_code == 2


def test_a_link_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    """A folder of the output that is a symbolic link to elsewhere is not written through."""
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "parts").symlink_to(outside)
    with pytest.raises(StorageError, match="leads out of"):
        LocalStore(str(root)).put("parts/x", b"")
    assert list(outside.iterdir()) == []


def test_a_linked_root_is_fine(tmp_path: Path) -> None:
    """The output itself may be a symbolic link to a folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LocalStore(str(tmp_path / "link")).put("x", b"1")
    assert (tmp_path / "real" / "x").read_bytes() == b"1"


def test_unfinished_files_are_hidden_and_swept(tmp_path: Path) -> None:
    """What a killed writer left is neither listed nor kept."""
    store = LocalStore(str(tmp_path))
    store.put("a/x", b"1")
    for folder in (tmp_path, tmp_path / "a"):
        (folder / ".batchrun-1-abc.tmp").write_bytes(b"half")
    assert tuple(item.path for item in store.list()) == ("a/x",)
    store.sweep()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "x"]


def test_file_urls_and_home_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`file://` and `~` mean what a shell user expects."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Store.open("~/a").put("x", b"1")
    Store.open(f"file://{tmp_path}/b").put("x", b"2")
    assert ((tmp_path / "a/x").read_bytes(), (tmp_path / "b/x").read_bytes()) == (b"1", b"2")
