"""Bringing a model's checkpoint to this machine, once, and knowing that it arrived whole."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchrun.data.border import Role, border, filesystem, local_path, scheme_of
from batchrun.data.footers import open_ranged
from batchrun.data.remote import fingerprint_of
from batchrun.errors import CheckpointError, StorageError
from batchrun.job import TINY

# Nothing else of a checkpoint is ever fetched: no pickles, no code.
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt")
_WEIGHTS = ".safetensors"
_RECORD = "batchrun-files.json"
_CHUNK_BYTES = 8 << 20


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where remote checkpoints are kept: ``$BATCHRUN_CACHE``, else the user's cache."""
    own = environ.get("BATCHRUN_CACHE")
    if own:
        return Path(own).expanduser() / "checkpoints"
    return Path.home() / ".cache" / "batchrun" / "checkpoints"


def find_checkpoint(
    model: str, storage_options: Mapping[str, object] | None = None, *, weights: bool = True
) -> Path:
    """The local folder of a model: ``tiny``, which ships with the package, else :func:`fetch`."""
    if model == TINY:
        return Path(__file__).parents[1] / "models" / TINY
    return fetch(model, storage_options, weights=weights)


def fetch(
    url: str, storage_options: Mapping[str, object] | None = None, *, weights: bool = True
) -> Path:
    """The local folder of the checkpoint at ``url``.

    A local folder is used as it is. A remote one is downloaded once a machine: concurrent callers
    wait for the first, and a version that changed at its source is another entry of the cache.
    Without ``weights`` a remote one may come without its weight files, which must exist.
    Raises :class:`~batchrun.errors.CheckpointError` for a folder that does not exist or has no
    ``config.json``, and StorageError when storage fails.
    """
    if scheme_of(url) == "file":
        return _local(url)
    fs, root = filesystem(url, storage_options, Role.CHECKPOINT)
    with border(Role.CHECKPOINT, url, early=True):
        files = _list(fs, root)
    if "config.json" not in files:
        raise _no_config(url)
    small = {name: entry for name, entry in files.items() if not name.endswith(_WEIGHTS)}
    if weights or (len(small) < len(files) and _is_whole(_target(url, files), files)):
        return _bring(fs, root, url, files)
    folder = _bring(fs, root, url, small)
    _check_weight_names(url, folder, files)
    return folder


def is_remote(url: str) -> bool:
    """Whether a checkpoint lies elsewhere, so that it is downloaded before it is used."""
    return scheme_of(url) != "file"


def remote_fingerprint(url: str, storage_options: Mapping[str, object] | None = None) -> str:
    """A hash that tells versions of the remote checkpoint at ``url`` apart, by a listing alone."""
    fs, root = filesystem(url, storage_options, Role.CHECKPOINT)
    with border(Role.CHECKPOINT, url, early=True):
        files = _list(fs, root)
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _bring(fs: Any, root: str, url: str, files: Mapping[str, list[object]]) -> Path:
    """The folder of the cache with exactly these files of the checkpoint."""
    target = _target(url, files)
    with _locked(target):
        if not _is_whole(target, files):
            shutil.rmtree(target, ignore_errors=True)
            _download(fs, root, url, files, target)
    return target


def _target(url: str, files: Mapping[str, list[object]]) -> Path:
    key = hashlib.sha256(json.dumps([url.rstrip("/"), files], sort_keys=True).encode())
    return cache_folder() / key.hexdigest()[:32]


def _check_weight_names(url: str, folder: Path, files: Mapping[str, list[object]]) -> None:
    """Every weight file that the index promises is there, or at least one without an index."""
    present = {name for name in files if name.endswith(_WEIGHTS)}
    index = folder / "model.safetensors.index.json"
    promised: set[str] = set()
    if index.is_file() and "model.safetensors" not in present:
        try:
            promised = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"checkpoint: {url}/{index.name} is not an index of weights", "copy it again"
            ) from error
    if missing := sorted(promised - present):
        raise CheckpointError(
            f"checkpoint: {url}/{index.name} names weight files that are missing: "
            f"{', '.join(missing)}",
            "copy the checkpoint again",
        )
    if not present:
        raise CheckpointError(
            f"checkpoint: {url} holds no weights: no *.safetensors", "copy the checkpoint again"
        )


def _local(url: str) -> Path:
    folder = Path(local_path(url))
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint: {folder} is not a folder"
            if folder.exists()
            else f"checkpoint: {folder} does not exist",
            "model.path is a folder in the Hugging Face layout, a URL of one, or `tiny`",
        )
    if not (folder / "config.json").is_file():
        raise _no_config(str(folder))
    return folder


def _no_config(url: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: {url} has no config.json",
        "name the folder that holds config.json, tokenizer.json and the *.safetensors files",
    )


def _list(fs: Any, root: str) -> dict[str, list[object]]:
    """Name -> [size, fingerprint] of the files of the checkpoint that are ever needed."""
    try:
        found = fs.ls(root, detail=True)
    except FileNotFoundError as error:
        if error.__cause__ is not None:
            raise  # the bucket itself is missing
        return {}
    return {
        posixpath.basename(item["name"]): [int(item["size"]), fingerprint_of(item)]
        for item in found
        if item["type"] == "file" and item["name"].endswith(_SUFFIXES)
    }


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process of this machine at a time; the kernel frees the lock of one that dies."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise StorageError(
            f"the cache of checkpoints {target.parent} cannot be written ({error})",
            "set BATCHRUN_CACHE to a folder with room for the checkpoint",
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_whole(target: Path, files: Mapping[str, list[object]]) -> bool:
    """Whether the cache holds every file with the size that was checksummed at download."""
    try:
        record = json.loads((target / _RECORD).read_text())
        return set(record) == set(files) and all(
            (target / name).stat().st_size == entry["size_bytes"] for name, entry in record.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download(
    fs: Any, root: str, url: str, files: Mapping[str, list[object]], target: Path
) -> None:
    """Download into a folder aside and put it in place when every file has its size."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    record: dict[str, dict[str, object]] = {}
    for name, (size, _) in sorted(files.items()):
        with border(Role.CHECKPOINT, f"{url.rstrip('/')}/{name}"):
            written, digest = _copy(fs, f"{root.rstrip('/')}/{name}", partial / name)
        if written != size:
            raise StorageError(
                f"checkpoint: {url}/{name} ended after {written} of {size} bytes", "submit again"
            )
        record[name] = {"size_bytes": written, "sha256": digest}
    (partial / _RECORD).write_text(json.dumps(record, indent=1))
    os.rename(partial, target)


def _copy(fs: Any, location: str, target: Path) -> tuple[int, str]:
    """Copy one file; its size and sha256."""
    digest = hashlib.sha256()
    written = 0
    with open_ranged(fs, location, block_bytes=_CHUNK_BYTES) as source, target.open("xb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            sink.write(chunk)
            digest.update(chunk)
            written += len(chunk)
        sink.flush()
        os.fsync(sink.fileno())
    return written, digest.hexdigest()
