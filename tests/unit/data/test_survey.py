"""A part of the input that says much of all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.data import survey
from batchrun.data.schema import InputColumns
from batchrun.data.survey import Estimate, FooterSurvey, cut_windows, draw, mean_of, read_windows
from batchrun.errors import ShardError

COLUMNS = InputColumns(prompt="q")


@pytest.fixture
def bucket() -> Iterator[str]:
    """60 files of one to 300 rows in a file system that is not local."""
    fs = fsspec.filesystem("memory")
    for number in range(60):
        rows = 300 if number == 13 else 1 + number % 7
        table = pa.table({"q": [f"question {i} of file {number}" for i in range(rows)]})
        with fs.open(f"/survey/f{number:02d}.parquet", "wb") as sink:
            pq.write_table(table, sink, row_group_size=100)
    yield "memory://survey"
    fs.rm("/survey", recursive=True)


def test_drawing_by_size() -> None:
    """Every place is drawn as often as its size says, big ones always; nothing of nothing."""
    sizes = [1.0, 50.0, 0.0, 9.0]
    hits = Counter[int]()
    for seed in range(300):
        drawn = draw(sizes, 6, Random(seed))
        assert sum(drawn.values()) == 6
        assert drawn[1] in (5, 6)
        hits.update(drawn)
    assert hits[2] == 0
    assert hits[3] / 300 == pytest.approx(0.9, abs=0.1)
    assert draw([0.0, 0.0], 3, Random(0)) == {}


def test_means_and_their_errors() -> None:
    """The error is two standard errors; one draw alone says nothing of it."""
    assert mean_of([4.0, 6.0]) == Estimate(5.0, 2.0)
    assert mean_of([7.0]) == Estimate(7.0, 7.0)
    assert mean_of([]) == Estimate(0.0)
    assert Estimate(200.0, 10.0).ratio == 0.05


def test_all_footers_of_few_files(bucket: str) -> None:
    """Up to 512 files are all read, and so is any number where all are asked for."""
    for whole in (FooterSurvey(), FooterSurvey(exact=True), FooterSurvey(limit=5)):
        files, problems = whole.find(bucket, {})
        assert (len(files), problems, whole.is_sampled) == (60, [], False)
        assert whole.total(files, [float(file.num_rows) for file in files]) == Estimate(527.0)
        assert {whole.weight(file) for file in files} == {1.0}


def test_some_footers_of_many_files(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond that some are read, by size, and stand for the others: the rows of the whole input
    are estimated with an error that holds the truth, and the same seed gives the same."""
    monkeypatch.setattr(survey, "MAX_FOOTERS", 24)
    some = FooterSurvey(seed=3)
    files, problems = some.find(bucket, {})
    assert problems == [] and some.is_sampled
    assert 12 <= len(files) <= 24 and some.num_files == 60
    assert any(file.num_rows == 300 for file in files)
    rows = some.total(files, [float(file.num_rows) for file in files])
    assert 0 < rows.error < 400
    assert abs(rows.value - 527) < rows.error
    again, _ = FooterSurvey(seed=3).find(bucket, {})
    assert [file.uri for file in again] == [file.uri for file in files]
    all_of_them = FooterSurvey(exact=True)
    assert len(all_of_them.find(bucket, {})[0]) == 60


def test_windows_hold_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are stretches of row groups in order, up to the limit, and are read as they say."""
    monkeypatch.setattr(survey, "MAX_WINDOW_ROWS", 64)
    texts = [f"question {number}" for number in range(300)]
    pq.write_table(pa.table({"q": texts}), tmp_path / "a.parquet", row_group_size=100)
    files, _ = FooterSurvey().find(str(tmp_path), {})
    windows = cut_windows(files, COLUMNS, [2.0])
    assert [window.num_rows for window in windows] == [64, 36, 64, 36, 64, 36]
    assert {window.weight for window in windows} == {2.0}
    read = read_windows(windows, COLUMNS)
    assert [row.values["q"] for rows in read if isinstance(rows, list) for row in rows] == texts
    cut = cut_windows(files, COLUMNS, [1.0], limit=110)
    assert [window.num_rows for window in cut] == [64, 36, 10]
    assert read_windows([], COLUMNS) == []


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A window of a file that changed meanwhile says why it has no rows; the others have theirs."""
    for name in ("a", "b"):
        pq.write_table(pa.table({"q": ["one", "two"]}), tmp_path / f"{name}.parquet")
    files, _ = FooterSurvey().find(str(tmp_path), {})
    pq.write_table(pa.table({"q": ["one", "two", "three"]}), tmp_path / "b.parquet")
    whole, changed = read_windows(cut_windows(files, COLUMNS, [1.0, 1.0]), COLUMNS)
    assert isinstance(whole, list) and len(whole) == 2
    assert isinstance(changed, ShardError) and "changed" in changed.message
