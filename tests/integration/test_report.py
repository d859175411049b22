"""What `batchrun report` says of a real run, and how its page looks to a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

import batchrun as package
from batchrun.cli import main
from batchrun.data.store import Store
from batchrun.report import read_report
from tests.integration.conftest import Work, sums

HOSTILE = '<script>alert("x")</script>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Work:
    """A run of 63 rows, three of which failed, with a price and a thinking budget."""
    work = Work(tmp_path_factory.mktemp("report"))
    work.write("a", [*sums(19), HOSTILE, None, "", "word " * 4000])
    work.write("b", sums(40, start=21))
    package.run(
        work.raw(
            generation={"max_tokens": 100, "max_thinking_tokens": 12},
            resources={"price_per_gpu_hour": 36.0},
        )
        | {"name": HOSTILE}
    )
    return work


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(main, [str(item) for item in arguments], prog_name="batchrun")
    return result.exit_code, result.stdout, result.stderr


def _made(row: dict[str, object]) -> int:
    return int(str(row["reasoning_tokens"])) + int(str(row["completion_tokens"]))


def test_the_document_agrees_with_the_output(ran: Work) -> None:
    """Counts, reasons, errors and distributions are those of the rows."""
    code, out, _ = call("report", ran.folder / "out", "--format", "json")
    found, rows = json.loads(out), ran.rows()
    assert 0 == code
    assert ("finished with failures", "bad") == (found["state"], found["verdict"])
    assert {"total": 63, "done": 63, "failed": 3, "left": 0} == found["rows"]
    assert dict(Counter(row["finish_reason"] for row in rows)) == found["finish_reasons"]
    kinds = Counter(str(row["error"]).partition(":")[0] for row in rows if row["error"])
    assert dict(kinds) == found["errors"] and {"invalid_prompt", "too_long"} <= set(kinds)
    for name, spread in found["tokens"].items():
        values = sorted(int(str(row[name])) for row in rows)
        assert 63 == sum(spread["counts"])
        assert (values[-1], values[31]) == (spread["most"], spread["p50"])
        assert pytest.approx(sum(values) / 63) == spread["mean"]
    longest = max(_made(row) for row in rows)
    first = found["longest"][0]
    assert longest == first["reasoning_tokens"] + first["completion_tokens"]
    assert {row["id"] for row in rows if row["error"]} == {item["id"] for item in found["failures"]}


def test_time_and_money_add_up(ran: Work) -> None:
    """What the workers' time went into is their time, and the cost follows from it."""
    report = read_report(Store.open(str(ran.folder / "out")))
    (history,) = report.histories
    assert ("too_many_failures", 3) == (history.outcome, history.exit_code)
    assert report.seconds["generate"] > 0 and report.seconds["load"] > 0
    assert sum(report.seconds.values()) == pytest.approx(report.worker_hours * 3600)
    assert report.worker_hours * 3600 <= history.elapsed_s * len(history.workers) + 1
    assert report.cost(report.worker_hours) == pytest.approx(report.worker_hours * 36.0)
    assert report.sampled_tokens >= sum(_made(row) for row in ran.rows())


def test_the_page_is_whole_by_itself_and_takes_texts_as_texts(ran: Work, tmp_path: Path) -> None:
    """Nothing is fetched when it is opened, and no text of a row or a job becomes markup."""
    target = tmp_path / "page.html"
    code, out, err = call("report", ran.folder / "out", "-o", target)
    assert (0, "") == (code, out) and str(target) in err
    page = target.read_text()
    assert not re.search(r"<script|<link|<img|\ssrc=|url\(|@import", page)
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;") in page
    assert "batchrun retry" not in page  # what failed would fail again
    for words in ("finished with failures", "too_long", "Where the workers", "Tokens of a sample"):
        assert words.lower() in page.lower()


def test_nothing_of_a_row_is_shown_where_texts_are_private(ran: Work, tmp_path: Path) -> None:
    """With --no-samples neither ids nor errors nor answers are there, but all counts are."""
    code, out, _ = call("report", ran.folder / "out", "--no-samples", "-o", "-")
    assert 0 == code
    assert "a.parquet" not in out and "The longest samples" not in out
    assert "too_long" in out and "Tokens of a sample" in out
    _, out, _ = call("report", ran.folder / "out", "--no-samples", "--format", "json")
    assert ([], []) == (json.loads(out)["failures"], json.loads(out)["longest"])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_sideways_scrolling(
    ran: Work, tmp_path: Path, width: int
) -> None:
    """On a phone and on a desk the page is as wide as the screen, and all its charts are drawn."""
    target = tmp_path / "page.html"
    call("report", ran.folder / "out", "-o", target)
    heights = "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    width_of_page = "document.documentElement.scrollWidth"
    facts = f"JSON.stringify([{width_of_page}, innerWidth, {heights}])"
    probe = f"<script>document.title = {facts}</script>"
    framed = tmp_path / "probe.html"
    framed.write_text(target.read_text().replace("</body>", probe + "</body>"))
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --dump-dom"
    place = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), place, f"--window-size={width},900", f"file://{framed}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    title = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    assert title is not None, done.stderr[-500:]
    scroll_width, inner_width, charts = json.loads(title[1])
    assert scroll_width <= inner_width
    assert len(charts) >= 7 and min(charts) > 10


def test_an_output_without_a_run_is_named(tmp_path: Path) -> None:
    """No run is exit code 2, with a hint."""
    code, _, err = call("report", tmp_path)
    assert 2 == code and "holds no run" in err and "hint:" in err


def test_a_page_that_cannot_be_written_says_so(ran: Work, tmp_path: Path) -> None:
    """Exit code 2; the place is named, with what to do, and nothing half written stays there."""
    code, _, err = call("report", ran.folder / "out", "-o", tmp_path / "missing" / "x.html")
    assert 2 == code and f"there is no folder {tmp_path / 'missing'}; make it first" in err
    (tmp_path / "x.html").mkdir()
    code, _, err = call("report", ran.folder / "out", "-o", tmp_path / "x.html")
    assert 2 == code and "x.html cannot be written: Is a directory; give another" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.html"]


def test_a_plan_stands_beside_what_happened(ran: Work, tmp_path: Path) -> None:
    """What was foretold, with its range, next to what it was: prompt tokens, output tokens, time
    and money."""
    report = read_report(Store.open(str(ran.folder / "out")))
    counts = report.status.counts
    spread = {"low": 1.0, "expected": 2.0, "high": 3.0}
    plan = {
        "format": "batchrun-plan",
        "version": 1,
        "prompts": {"total": {"value": counts.prompt_tokens * 1.01, "error": 200.0}},
        "output": {"samples_per_row": 1, "tokens_per_sample": {**spread, "high": 100.0}},
        "done_rows": 0,
        "sequences_in_flight": 4096,
        "durations": [
            {
                "workers": 1,
                "seconds": {**spread, "high": 3600.0},
                "worker_hours": {"low": 100.0, "expected": 200.0, "high": 300.0},
                "cost": {"low": 0.0, "expected": 1.0, "high": 1e9},
            }
        ],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    code, out, _ = call("report", ran.folder / "out", "--plan", path, "--format", "json")
    found = {item["what"]: item for item in json.loads(out)["foretold"]}
    assert 0 == code
    assert {"prompt tokens", "tokens of a sample", "seconds", "worker hours", "cost"} <= set(found)
    assert counts.prompt_tokens == found["prompt tokens"]["actual"]
    assert found["prompt tokens"]["within"] and found["tokens of a sample"]["within"]
    assert found["seconds"]["within"] and not found["worker hours"]["within"]
    _, page, _ = call("report", ran.folder / "out", "--plan", path, "-o", "-")
    assert "as foretold" in page and "outside" in page


@pytest.mark.parametrize("text", ["", "{}", '{"format": "batchrun-plan", "version": 99}'])
def test_what_is_no_plan_is_named(ran: Work, tmp_path: Path, text: str) -> None:
    """Another document in a plan's place is an error that says how to make one."""
    path = tmp_path / "plan.json"
    path.write_text(text)
    code, _, err = call("report", ran.folder / "out", "--plan", path)
    assert 2 == code and "is no plan" in err and "batchrun plan JOB.yaml --json" in err
