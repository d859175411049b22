"""Finding the input, and saying what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchrun.data import inputs as inputs_module
from batchrun.data.inputs import InputColumns, find_input, list_input
from batchrun.data.store import Store
from batchrun.errors import InputError
from tests.conftest import S3Server
from tests.unit.data.parquet import planned, prompts, read_all, write


def names(paths: object, options: object = None) -> list[str]:
    """The paths found, as they stand in row ids."""
    return [file.path for file in list_input(paths, options)]  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with files that count and files that do not."""
    for name in (
        "b.parquet",
        "a.parquet",
        "sub/deep/c.parquet",
        "_batchrun/x.parquet",
        ".hidden.parquet",
        "sub/_tmp.parquet",
        "10.parquet",
        "9.parquet",
    ):
        write(tmp_path / name, prompts(1))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "_SUCCESS").write_text("{}")
    return tmp_path


def test_a_folder_means_its_parquet_files_in_name_order(tree: Path) -> None:
    """Recursively, without names that begin with _ or ."""
    expected = ["10.parquet", "9.parquet", "a.parquet", "b.parquet", "sub/deep/c.parquet"]
    assert expected == names(str(tree))
    assert expected == names(f"file://{tree}")
    assert expected == names(f"{tree}/")


def test_a_file_a_glob_and_a_list(tree: Path) -> None:
    """A file is itself, a glob its matches, a list all of its entries once."""
    assert names(str(tree / "a.parquet")) == ["a.parquet"]
    assert names(f"{tree}/[ab].parquet") == ["a.parquet", "b.parquet"]
    assert names(f"{tree}/**/*.parquet") == [
        "10.parquet",
        "9.parquet",
        "a.parquet",
        "b.parquet",
        "sub/deep/c.parquet",
    ]
    assert names([f"{tree}/b.parquet", f"{tree}/?.parquet"]) == [
        "b.parquet",
        "9.parquet",
        "a.parquet",
    ]
    assert len(names([str(tree), f"{tree}/*.parquet"])) == 5


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    """A file that exists under the very name is meant, not a pattern."""
    write(tmp_path / "data[1].parquet", prompts(1))
    write(tmp_path / "data1.parquet", prompts(1))
    assert names(str(tmp_path / "data[1].parquet")) == ["data[1].parquet"]


def test_names_that_read_like_urls_are_names(tmp_path: Path) -> None:
    """Colons, blanks, percent signs and question marks in names of local files mean nothing."""
    odd = ["a::b.parquet", "a b%20?#.parquet", "x:", "ü😀.parquet"]
    for name in odd:
        write(tmp_path / (f"{name}/y.parquet" if name == "x:" else name), prompts(2))
    assert names(str(tmp_path)) == ["a b%20?#.parquet", "a::b.parquet", "x:/y.parquet", odd[3]]
    assert names(f"{tmp_path}/x://y.parquet") == ["y.parquet"]
    shards, schema, _ = planned(tmp_path, InputColumns(prompt="prompt"))
    assert [len(read_all(shard, schema)[0]) for shard in shards] == [2] * 4


def test_a_name_with_control_characters_is_told(tmp_path: Path) -> None:
    """Before the run, not by a worker in the middle of it; the message shows no raw character."""
    write(tmp_path / "a\x1b[31m\n.parquet", prompts(1))
    with pytest.raises(InputError, match="control characters") as caught:
        list_input(str(tmp_path))
    assert "\x1b" not in str(caught.value)


def test_a_file_needs_no_suffix(tmp_path: Path) -> None:
    """A file that is named is read whatever its name."""
    write(tmp_path / "_data", prompts(1))
    assert names(str(tmp_path / "_data")) == ["_data"]


def test_equal_names_in_a_list_of_folders_are_told_apart(tmp_path: Path) -> None:
    """Default row ids stay unique over a list of inputs."""
    write(tmp_path / "one/x.parquet", prompts(1))
    write(tmp_path / "two/x.parquet", prompts(1))
    write(tmp_path / "two/y.parquet", prompts(1))
    assert names([str(tmp_path / "one"), str(tmp_path / "two")]) == [
        "one/x.parquet",
        "two/x.parquet",
        "y.parquet",
    ]


def test_relative_paths(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is relative to where the command is run."""
    monkeypatch.chdir(tree.parent)
    assert names(f"{tree.name}/a.parquet") == ["a.parquet"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none", "does not exist"),
        ("none.parquet", "does not exist"),
        ("none/*.parquet", "no file matches"),
        ("empty", r"holds no \*\.parquet"),
    ],
)
def test_nothing_found_is_an_error(tmp_path: Path, path: str, message: str) -> None:
    """An input without files is exit 2, naming the path."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        list_input(str(tmp_path / path))
    assert str(tmp_path / path) in str(caught.value)


def damaged(path: Path, how: str) -> None:
    """A file with one thing wrong."""
    good = write(path, prompts(100)).read_bytes()
    footer = int.from_bytes(good[-8:-4], "little")
    changed = {
        "empty": b"",
        "text": b"id,prompt\n1,hello\n",
        "tiny": b"PAR1",
        "cut": good[:-20],
        "half": good[: len(good) // 2],
        "long footer": good[:-8] + (1 << 30).to_bytes(4, "little") + b"PAR1",
        "zero footer": good[:-8] + (0).to_bytes(4, "little") + b"PAR1",
        "torn footer": good[: -8 - footer] + b"\xff" * footer + good[-8:],
        "encrypted": good[:-4] + b"PARE",
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", r"is empty \(0 bytes\)"),
        ("text", "is not a Parquet file"),
        ("tiny", "truncated"),
        ("cut", "truncated"),
        ("half", "truncated"),
        ("long footer", "truncated"),
        ("zero footer", "damaged"),
        ("torn footer", "damaged"),
        ("encrypted", "encrypted"),
    ],
)
def test_files_that_are_no_parquet_are_named(tmp_path: Path, how: str, message: str) -> None:
    """Each kind of damage is told before anything is written, with the file's name."""
    damaged(tmp_path / "bad.parquet", how)
    with pytest.raises(InputError, match=message) as caught:
        list_input(str(tmp_path))
    assert "bad.parquet" in str(caught.value) and caught.value.exit_code == 2


def test_every_problem_is_found_and_good_files_stay(tmp_path: Path) -> None:
    """One look gives all problems and all usable files."""
    write(tmp_path / "in/good.parquet", prompts(3))
    damaged(tmp_path / "in/bad-1.parquet", "empty")
    damaged(tmp_path / "in/bad-2.parquet", "text")
    files, problems = find_input([str(tmp_path / "in"), str(tmp_path / "none")])
    assert [file.path for file in files] == ["good.parquet"]
    assert len(problems) == 3
    with pytest.raises(InputError) as caught:
        list_input([str(tmp_path / "in"), str(tmp_path / "none")])
    assert all(name in str(caught.value) for name in ("bad-1", "bad-2", "none"))


@pytest.mark.parametrize("step", [1, 7])
def test_a_file_cut_anywhere_never_raises_anything_else(tmp_path: Path, step: int) -> None:
    """Cutting a file at many places, or turning its footer's bytes, is always an InputError."""
    good = write(tmp_path / "good.parquet", prompts(3)).read_bytes()
    bad = tmp_path / "in" / "bad.parquet"
    bad.parent.mkdir()
    footer = int.from_bytes(good[-8:-4], "little")
    for place in range(0, len(good), 37):
        bad.write_bytes(good[:place])
        assert len(find_input(str(bad.parent))[1]) == 1
    for place in range(len(good) - 8 - footer, len(good) - 8, 29 + step):
        turned = bytearray(good)
        turned[place] ^= 0xFF
        bad.write_bytes(turned)
        files, problems = find_input(str(bad.parent))
        assert len(files) + len(problems) == 1


def test_footers_tell_rows_and_sizes(tmp_path: Path) -> None:
    """Row groups, rows and column sizes come from the footer, nested columns included."""
    conversation = [[{"role": "user", "content": "x" * 100}]] * 10
    write(
        tmp_path / "x.parquet",
        {"messages": conversation, "n": list(range(10))},
        row_group_size=4,
        compression="none",
        use_dictionary=False,
    )
    (file,) = list_input(str(tmp_path))
    assert [group.num_rows for group in file.row_groups] == [4, 4, 2]
    assert file.num_rows == 10
    assert file.row_groups[0].column_bytes[0] > 400 > file.row_groups[0].column_bytes[1] > 0


def test_inputs_on_s3(s3_server: S3Server, tmp_path: Path) -> None:
    """Folder, glob and file on S3, with ETags that pin them; a missing bucket is named."""
    store = Store.open(f"{s3_server.url}/in", s3_server.storage_options)
    body = write(tmp_path / "x.parquet", prompts(5)).read_bytes()
    for name in ("b.parquet", "a b.parquet", "_no.parquet", "sub/c.parquet", "x.txt"):
        store.put(name, body)
    options = s3_server.storage_options
    url = s3_server.url
    assert names(f"{url}/in/", options) == ["a b.parquet", "b.parquet", "sub/c.parquet"]
    assert names(f"{url}/in/*.parquet", options) == ["a b.parquet", "b.parquet"]
    assert names(url, options) == ["in/a b.parquet", "in/b.parquet", "in/sub/c.parquet"]
    (file,) = list_input(f"{url}/in/b.parquet", options)
    found = store.info("b.parquet")
    assert found is not None
    assert (f"{url}/in/b.parquet", found.fingerprint, len(body), 5) == (
        file.uri,
        file.fingerprint,
        file.size_bytes,
        file.num_rows,
    )
    with pytest.raises(InputError, match="does not exist"):
        list_input(f"{url}/none/", options)
    with pytest.raises(InputError, match="bucket of s3://no-such-bucket-x"):
        list_input("s3://no-such-bucket-x/in", options)


def test_any_url_of_fsspec_is_an_input() -> None:
    """Inputs are read from whatever fsspec reads."""
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open("memory://batchrun-test/in/a.parquet", "wb") as sink:
        pq.write_table(pa.table(prompts(2)), sink)
    (file,) = list_input("memory://batchrun-test/in")
    assert (file.path, file.num_rows) == ("a.parquet", 2)


def test_footers_of_known_files_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one listing read, the next one takes over, but of files that changed meanwhile."""
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.parquet", prompts(3))
    known = list_input(str(tmp_path))
    write(tmp_path / "b.parquet", prompts(4))
    write(tmp_path / "d.parquet", prompts(5))
    (tmp_path / "c.parquet").unlink()
    read: list[str] = []
    real = inputs_module.read_footer

    def counted(fs: Any, location: str, *rest: Any) -> Any:
        read.append(Path(location).name)
        return real(fs, location, *rest)

    monkeypatch.setattr(inputs_module, "read_footer", counted)
    files = list_input(str(tmp_path), known=known)
    assert sorted(read) == ["b.parquet", "d.parquet"]
    assert [(file.path, file.num_rows) for file in files] == [
        ("a.parquet", 3),
        ("b.parquet", 4),
        ("d.parquet", 5),
    ]
    assert list_input(str(tmp_path / "a.parquet"), known=known)[0].path == "a.parquet"
