"""Parts that a changed job takes over from the runs before it in the same output.

``kept-<n>.json`` in a run's folder lists them, create-only. The run with the highest number is the
one that the output holds; a run that began in an empty output has none and counts as 0.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.data.border import Role, border
from batchrun.data.layout import FOLDER, KEPT_NAME, run_folder
from batchrun.data.parts import part_from_json
from batchrun.data.store import Store
from batchrun.errors import OutputError
from batchrun.records import Part, Shard


@dataclass(frozen=True, slots=True)
class KeptParts:
    """What a run took over: ``parts`` by shard number and the runs that they are of.

    ``earlier`` are all the runs that the output held before; ``number`` is that of the file, 0
    where there is none.
    """

    number: int = 0
    parts: Mapping[int, Part] = field(default_factory=dict)
    runs: Mapping[int, str] = field(default_factory=dict)
    earlier: tuple[str, ...] = ()

    @property
    def num_parts(self) -> dict[str, int]:
        """How many parts are of each of those runs."""
        return dict(Counter(self.runs.values()))


def newest_run(store: Store) -> str | None:
    """The id of the run that the output holds, or None."""
    names = [
        name
        for name in store.folders(FOLDER)
        if store.info(f"{run_folder(name)}/job.json") is not None
    ]
    if len(names) < 2:
        return names[0] if names else None
    return max(names, key=lambda name: _last_number(store, name))


def read_kept_parts(store: Store, run: str) -> KeptParts:
    """The parts that ``run`` took over from others."""
    number = _last_number(store, run)
    if not number:
        return KeptParts()
    path = _path(run, number)
    try:
        raw = json.loads(store.read(path) or b"null")
        parts: dict[int, Part] = {}
        runs: dict[int, str] = {}
        for item in raw["parts"]:
            part = part_from_json(json.dumps(item["part"]).encode())
            parts[part.shard], runs[part.shard] = part, str(item["run"])
        return KeptParts(number, parts, runs, tuple(map(str, raw["earlier"])))
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(f"output: {store.url}/{path} is damaged ({error!r})") from error


def keep_parts(
    store: Store, run: str, before: str, parts: Mapping[int, Part], shards: Iterable[Shard]
) -> None:
    """Record that ``run`` takes over ``parts`` from the run ``before``, and what that had kept."""
    kept = read_kept_parts(store, before)
    inputs = {shard.number: shard for shard in shards}
    record = {
        "run_id": run,
        "earlier": sorted({*kept.earlier, before} - {run}),
        "parts": [
            {
                "run": kept.runs.get(number, before),
                "input": inputs[number].path,
                "fingerprint": inputs[number].fingerprint,
                "part": asdict(parts[number]),
            }
            for number in sorted(parts)
        ],
    }
    data = json.dumps(record, indent=1).encode()
    number = max(kept.number, _last_number(store, run))
    while True:
        number += 1
        if store.put_if_absent(_path(run, number), data, uuid.uuid4().hex):
            return


def check_columns(
    store: Store, parts: Iterable[Part], runs: Mapping[int, str], schema: pa.Schema
) -> None:
    """Raise OutputError unless parts of ``schema`` would have the columns of these parts.

    Parts of one run have the same columns: one of each is looked at.
    """
    looked: set[str] = set()
    for part in parts:
        run = runs.get(part.shard, "")
        if run in looked:
            continue
        looked.add(run)
        with border(Role.OUTPUT, f"{store.url}/{part.name}"):
            with store.open_file(part.name) as source, pq.ParquetFile(source) as parquet:
                found = parquet.schema_arrow
        if not found.equals(schema, check_metadata=False):
            old = {f"{item.name}: {item.type}" for item in found}
            new = {f"{item.name}: {item.type}" for item in schema}
            differing = [f"without {text}" for text in sorted(old - new)]
            differing += [f"with {text}" for text in sorted(new - old)]
            raise OutputError(
                f"output: the finished parts of {store.url} have other columns than this job "
                f"writes ({', '.join(differing) or 'in another order'})",
                "choose another output, or run `batchrun discard OUTPUT` first",
            )


def _last_number(store: Store, run: str) -> int:
    names = [
        KEPT_NAME.fullmatch(item.path.rpartition("/")[2])
        for item in store.list(run_folder(run), recursive=False)
    ]
    return max((int(name[1]) for name in names if name), default=0)


def _path(run: str, number: int) -> str:
    return f"{run_folder(run)}/kept-{number:04d}.json"
