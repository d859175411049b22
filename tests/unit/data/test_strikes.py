"""Deaths of workers are on record before anybody acts on them, and stay."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from batchrun.data.layout import strikes_folder
from batchrun.data.store import Store
from batchrun.data.strikes import delete_strikes, read_strikes, write_strike
from batchrun.errors import OutputError
from batchrun.records import Strike
from batchrun.rows import Rows

RUN = "0123456789abcdef"
FIRST = Strike(
    worker="w-1",
    rows={3: Rows.of([7]), 12: Rows.of_ranges([(0, 2), (5, 9)])},
    alone=True,
    cause="died",
    message="exit code -9\nsegfault é",
    device="host-a/0",
)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_strike_comes_back_whole(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every field is read as it was written, in the order of drivers."""
    store = Store.open(str(tmp_path))
    if kind == "s3":
        server = request.getfixturevalue("s3_server")
        store = Store.open(f"{server.url}/out", server.storage_options)
    assert read_strikes(store, RUN) == ()
    second = Strike("w-1", {}, blind=True, idle=True)
    write_strike(store, RUN, 2, second)
    write_strike(store, RUN, 1, FIRST)
    assert read_strikes(store, RUN) == (FIRST, second)
    delete_strikes(store, RUN)
    assert read_strikes(store, RUN) == ()


def test_one_death_counts_once(tmp_path: Path) -> None:
    """However often it is written, and whatever is said of it later."""
    store = Store.open(str(tmp_path))
    write_strike(store, RUN, 1, FIRST)
    write_strike(store, RUN, 1, FIRST)
    write_strike(store, RUN, 1, Strike("w-1", {}))
    assert read_strikes(store, RUN) == (FIRST,)


@pytest.mark.parametrize("worker", ["a/b", "../../x", ".hidden", "é", "x" * 500])
def test_a_workers_name_never_leads_out_of_the_folder(tmp_path: Path, worker: str) -> None:
    """The file of a strike is named by something plain, and the strike still says who it was."""
    store = Store.open(str(tmp_path))
    write_strike(store, RUN, 1, Strike(worker, {0: Rows.of([1])}))
    [item] = store.list()
    assert item.path.startswith(f"{strikes_folder(RUN)}/000001-")
    assert [strike.worker for strike in read_strikes(store, RUN)] == [worker]
    with pytest.raises(OutputError, match="needs the name"):
        write_strike(store, RUN, 1, Strike("", {}))


GOOD = {
    "worker": "w-1",
    "rows": {"0": [[1, 2]]},
    "alone": False,
    "blind": False,
    "idle": False,
    "cause": "",
    "message": "",
    "device": "",
}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        *(
            json.dumps({**GOOD, **change}).encode()
            for change in (
                {"rows": {"x": [[1, 2]]}},
                {"rows": {"0": [[-1, 2]]}},
                {"rows": {"0": [[1]]}},
                {"rows": {"0": [[1.5, 2.5]]}},
                {"rows": {"0": [[True, 2]]}},
                {"rows": [0]},
                {"alone": 1},
                {"worker": None},
                {"unknown": 1},
            )
        ),
    ],
)
def test_a_damaged_strike_is_left_out(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It blames nobody, and the others are read."""
    store = Store.open(str(tmp_path))
    store.put(f"{strikes_folder(RUN)}/000000-w.json", data)
    write_strike(store, RUN, 1, FIRST)
    with caplog.at_level(logging.WARNING):
        assert read_strikes(store, RUN) == (FIRST,)
    assert "000000-w.json is damaged" in caplog.text
    store.put(f"{strikes_folder(RUN)}/000000-w.json", json.dumps(GOOD).encode())
    assert len(read_strikes(store, RUN)) == 2
