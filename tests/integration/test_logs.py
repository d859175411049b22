"""The log of a run: one look for a shard tells its story, and no word of a row stands in it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conftest import Call, Command, Work, sums, worker_pids

MARKER = "What is 77+5?"
SECRET = "AKIAIOSFODNN7EXAMPLE"
LONG = {"max_tokens": 900, "ignore_eos": True}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def worker_logs(session: Path) -> str:
    """What the workers of a Ray session logged."""
    files = (session / "logs").glob("worker-*.err")
    return "\n".join(path.read_text(errors="replace") for path in files)


def test_a_log_tells_the_story_of_every_shard(
    work: Work, batchrun: Callable[..., Command], cluster: str
) -> None:
    """A worker is killed in the middle. The lines with a shard's name say who had it, that it was
    lost and what was saved by then, and who published it; a failed row is named; neither prompts
    nor secrets nor raw control characters are there, nor in the workers' own lines."""
    import ray

    work.write("steady", [MARKER, *sums(11)], id=[f"id-{SECRET}", *(f"s{n}" for n in range(11))])
    work.write("broken", [None, None, *sums(2)], id=["b\x1b[31m0\n", "b1", "b2", "b3"])
    job = work.job_file(
        generation=LONG,
        input={"id_column": "id"},
        resources={"max_sequences": 4},
        checkpoint={"interval_s": 1},
        errors={"max_failed_rows": 2},
    )
    log = work.folder / "logs" / "run.log"
    command = batchrun("run", job, "--address", cluster, "--log-file", log)
    seen = '"lease_flushed"'
    command.wait_until(
        lambda: any(
            seen in line and "steady" in line
            for line in (log.read_text().splitlines() if log.exists() else ())
        )
    )
    for pid in worker_pids(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    code, _, err = command.end(120)
    assert 0 == code, err
    assert "worker 1-1 is lost" in err and "failed: invalid_prompt" in err

    lines = read_log(log)
    assert {"out"} == {line["job"] for line in lines} and 1 == len({line["run"] for line in lines})
    assert {1} == {line["epoch"] for line in lines}
    assert all(line["time"].endswith("Z") and line["message"] for line in lines)
    steady = [line for line in lines if "steady.parquet" in line.get("shard", "")]
    names = [line["event"] for line in steady]
    assert "lease_given" == names[0] and names[-1] == "shard_published"
    order = ["lease_given", "lease_flushed", "lease_lost", "lease_resumed", "shard_published"]
    assert order == [name for name in dict.fromkeys(names) if name in order]
    lost = steady[names.index("lease_lost")]
    assert ("1-1", "warning") == (lost["worker"], lost["level"])
    resumed = steady[names.index("lease_resumed")]
    assert resumed["worker"] == "1-2" and resumed["rows"] >= 1 and resumed["tokens"] >= 1
    published = steady[-1]
    assert ("1-2", 12) == (published["worker"], published["rows"])
    assert published["published_by"] == published["attempt"] > lost["attempt"]

    failed = [line for line in lines if line["event"] == "row_failed"]
    assert "invalid_prompt" == failed[0]["kind"] and "broken" in failed[0]["shard"]
    assert failed[0]["rows"] == 2 and failed[0]["row"] == "b\x1b[31m0\n"
    text = log.read_text()
    own = worker_logs(Path(ray._private.worker._global_node.get_session_dir_path()))
    story = [line for line in own.splitlines() if f'"run": "{lines[0]["run"]}"' in line]
    events = {json.loads(line)["event"] for line in story}
    assert {"lease_opened", "journal_written", "row_failed", "lease_ended"} <= events
    for where in (text, "\n".join(story), err):
        assert "77+5" not in where and SECRET not in where
        assert "\x1b[31m" not in where
        assert not any(question in where for question in sums(11))


def test_a_log_that_cannot_be_written_is_refused(work: Work, call: Call) -> None:
    """Before anything begins, with exit code 2 and the reason."""
    work.write("a", sums(1))
    code, out, err = call("submit", work.job_file(), "--log-file", work.folder)
    assert (2, "") == (code, out)
    assert "--log-file" in err and "Traceback" not in err
    assert not (work.folder / "out").exists()
