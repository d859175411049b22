"""Schedules: what a cron expression means, what is wrong with one, and the line for crontab."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from batchrun.errors import JobError
from batchrun.job import parse_job
from batchrun.jobfile import JobSource, read_job_file
from batchrun.schedule import (
    CronCommand,
    ScheduleError,
    crontab_line,
    parse_schedule,
    shell_command,
)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0 2 * * *", "0 2 * * *"),
        ("*/15  9-17 *\t* Mon-Fri", "*/15 9-17 * * 1-5"),
        ("5,35 0-23/2 1 JAN,jul *", "5,35 0-23/2 1 1,7 *"),
        ("0 0 * * 7", "0 0 * * 0"),
        ("0 0 * * 5-7", "0 0 * * 5,6,0"),
        ("0 0 * * sat,SUN", "0 0 * * 6,0"),
        ("0 0 29 2 *", "0 0 29 2 *"),
        ("0 0 1-31/2 * mon", "0 0 1-31/2 * 1"),
        ("@daily", "0 0 * * *"),
        ("@Weekly", "0 0 * * 0"),
        ("00 02 * * *", "0 2 * * *"),
    ],
)
def test_every_cron_gets_the_same_numbers(text: str, numbers: str) -> None:
    """Names, macros, 7 for Sunday and white space become what every cron reads alike."""
    assert parse_schedule(text).text == numbers
    assert parse_schedule(numbers).text == numbers


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("0 2 * *", "has 4 fields, not 5", '"0 2 * * *"'),
        ("0 0 2 * * *", "has 6 fields, not 5", '"0 2 * * *"'),
        ("", "has 0 fields", '"0 2 * * *"'),
        ("60 2 * * *", "the minute is 60, which is not within 0 to 59", "write 0 to 59"),
        ("0 24 * * *", "the hour is 24", "write 0 to 23"),
        ("0 0 0 * *", "the day of month is 0", "write 1 to 31"),
        ("0 0 * 13 *", "the month is 13", "write 1 to 12"),
        ("0 0 * * 8", "the day of week is 8", "write 0 to 7"),
        ("0 0 * jam *", "the month 'jam' is no number", "did you mean jan?"),
        ("0 0 * * monday", "the day of week 'monday' is no number", "did you mean mon?"),
        ("0 two * * *", "the hour 'two' is no number", "write 0 to 23"),
        ("0 22-2 * * *", "a range that ends before it begins", "write 22-23,0-2"),
        ("5/15 * * * *", "has a step and no range", "write 5-59/15"),
        ("*/0 * * * *", "the step '0', which is not within 1 to 59", "for example */5"),
        ("*/90 * * * *", "the step '90', which is not within 1 to 59", "for example */5"),
        ("0 0 ? * *", "the day of month '?' is no number, range, list or step", ", or *"),
        ("0 0 L * *", "the day of month 'L' is no number", "write 1 to 31"),
        ("0,, 0 * * *", "the minute '' is no number, range", "a list with commas"),
        ("*-5 0 * * *", "the minute '*-5' is no number", "a list with commas"),
        ("0 0 30 2 *", "never comes: no such month has a day 30", "a day that the month has"),
        ("0 0 31 4,6,9,11 *", "never comes: no such month has a day 31", "that the month has"),
        ("0 0 */2 * mon", "'*/2' beside another day field", "write 1-31/2"),
        ("0 0 1 * */2", "'*/2' beside another day field", "write 0-6/2"),
        ("@reboot", "'@reboot' is no time that cron and Kubernetes both know", "five fields"),
        ("@dayly", "'@dayly' is no time", "did you mean @daily?"),
        ("99999999999999999999 0 * * *", "the minute is 999999", "write 0 to 59"),
    ],
)
def test_a_wrong_expression_is_explained(text: str, message: str, hint: str) -> None:
    """Each mistake is named with its field, and how to mend it is said."""
    with pytest.raises(ScheduleError) as caught:
        parse_schedule(text)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_job_with_a_wrong_schedule_says_where(tmp_path: Path) -> None:
    """The line, the key, what is wrong and how to mend it, in one line."""
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: {path: tiny}\ninput: {path: in, prompt_column: p}\noutput: {path: out}\n"
        "schedule: 0 0 31 2 *\n"
    )
    with pytest.raises(JobError) as caught:
        parse_job(read_job_file(path))
    assert str(caught.value) == (
        f"{path}:4: schedule: never comes: no such month has a day 31; "
        "write a day that the month has"
    )


def test_a_schedule_does_not_decide_the_content() -> None:
    """Another schedule is the same run: what is finished stays finished."""
    raw = {"model": {"path": "tiny"}, "input": {"path": "in", "prompt_column": "p"},
           "output": {"path": "out"}}  # fmt: skip
    once, nightly = (
        parse_job(JobSource.of_mapping({**raw, **more})) for more in ({}, {"schedule": "@daily"})
    )
    assert nightly.schedule == "@daily"
    assert nightly.semantic() == once.semantic()


def ticks(text: str, start: str, zone: str = "Etc/UTC", count: int = 3) -> list[str]:
    """The next times as text."""
    moment = datetime.fromisoformat(start).replace(tzinfo=UTC)
    found = islice(parse_schedule(text).times_after(moment, ZoneInfo(zone)), count)
    return [f"{tick:%Y-%m-%d %H:%M %Z}" for tick in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 2 * * *", ["2026-02-27 02:00", "2026-02-28 02:00", "2026-03-01 02:00"]),
        ("30 */12 * * *", ["2026-02-26 12:30", "2026-02-27 00:30", "2026-02-27 12:30"]),
        ("0 0 31 * *", ["2026-03-31 00:00", "2026-05-31 00:00", "2026-07-31 00:00"]),
        ("0 0 29 2 *", ["2028-02-29 00:00", "2032-02-29 00:00"]),
        ("0 0 * * sun", ["2026-03-01 00:00", "2026-03-08 00:00", "2026-03-15 00:00"]),
        # Of either field: the first of the month, and Saturdays.
        ("0 0 1 * 6", ["2026-02-28 00:00", "2026-03-01 00:00", "2026-03-07 00:00"]),
    ],
)
def test_the_next_times(text: str, expected: list[str]) -> None:
    """Days of either day field count where both are bound; months have their lengths."""
    found = ticks(text, "2026-02-26T02:00", count=len(expected))
    assert found == [f"{tick} UTC" for tick in expected]


def test_times_are_those_of_the_zone() -> None:
    """Two o'clock in Berlin, in winter and in summer; the hour that is leapt over is left out."""
    assert ticks("0 2 * * *", "2026-03-27T12:00", "Europe/Berlin") == [
        "2026-03-28 02:00 CET",
        "2026-03-30 02:00 CEST",
        "2026-03-31 02:00 CEST",
    ]
    assert ticks("30 2 * * *", "2026-10-24T12:00", "Europe/Berlin", 2) == [
        "2026-10-25 02:30 CEST",
        "2026-10-26 02:30 CET",
    ]


def command(folder: Path, *program: str) -> CronCommand:
    """What cron would run in ``folder``."""
    return CronCommand(
        name="nightly",
        folder=str(folder),
        command=program,
        log_folder=str(folder / "100% logs"),
        keep_days=30,
        environ={"WHO": "it's $HOME"},
    )


def test_percent_signs_are_escaped(tmp_path: Path) -> None:
    """Cron turns % into a line break, so every one of the line is escaped, and none is else."""
    what = command(tmp_path, "echo", "50%")
    line = crontab_line(parse_schedule("@daily"), what)
    assert line.startswith("0 0 * * * cd ")
    assert line.removeprefix("0 0 * * * ").replace("\\%", "%") == shell_command(what)
    assert line.count("%") == line.count("\\%") == shell_command(what).count("%") >= 3
    assert "\n" not in line


@pytest.mark.parametrize(
    ("program", "code", "mailed"),
    [
        ("exit 0", 0, ""),
        ("exit 4", 0, ""),
        ("exit 75", 0, ""),
        ("exit 3", 3, "nightly: batchrun ended with exit code 3, see {log}\nsaid so\n"),
        ("exit 1", 1, "nightly: batchrun ended with exit code 1, see {log}\nsaid so\n"),
    ],
)
def test_cron_mails_only_what_needs_a_person(
    tmp_path: Path, program: str, code: int, mailed: str
) -> None:
    """Success, a run that is still alive and one that resumes are silent; all is in the log."""
    what = command(tmp_path, "sh", "-c", f'echo "$WHO" >who; echo said so >&2; {program}')
    done = subprocess.run(
        ["sh", "-c", shell_command(what)], capture_output=True, text=True, cwd="/", timeout=30
    )
    [log] = (tmp_path / "100% logs").iterdir()
    assert (done.returncode, done.stdout, done.stderr) == (code, mailed.format(log=log), "")
    assert log.name.startswith("nightly-20") and log.read_text() == "said so\n"
    assert (tmp_path / "who").read_text() == "it's $HOME\n"


def test_old_logs_go_and_others_stay(tmp_path: Path) -> None:
    """Only this job's logs are deleted, and only those that are too old."""
    import os

    logs = tmp_path / "100% logs"
    logs.mkdir()
    for name in ("nightly-2020-01-01.log", "nightly-eu-2020-01-01.log", "notes.txt"):
        (logs / name).touch()
        os.utime(logs / name, (0, 0))
    (logs / "nightly-2020-01-02.log").touch()
    subprocess.run(["sh", "-c", shell_command(command(tmp_path, "true"))], check=True, timeout=30)
    left = {path.name for path in logs.iterdir()}
    assert "nightly-2020-01-01.log" not in left
    assert {"nightly-eu-2020-01-01.log", "notes.txt", "nightly-2020-01-02.log"} < left


def test_an_env_file_is_read_each_time(tmp_path: Path) -> None:
    """Variables of the file reach the run; without the file nothing is started."""
    from dataclasses import replace

    what = replace(
        command(tmp_path, "sh", "-c", "echo $TOKEN >seen"), env_file=str(tmp_path / "env")
    )
    run = ["sh", "-c", shell_command(what)]
    assert subprocess.run(run, capture_output=True, timeout=30).returncode != 0
    assert not (tmp_path / "seen").exists()
    (tmp_path / "env").write_text("TOKEN='a b'\n")
    assert subprocess.run(run, capture_output=True, timeout=30).returncode == 0
    assert (tmp_path / "seen").read_text() == "a b\n"


def test_a_line_that_cron_would_not_take_is_refused(tmp_path: Path) -> None:
    """A line that is too long, and a path with a line break, are said before cron is."""
    daily = parse_schedule("@daily")
    with pytest.raises(ScheduleError, match="more than cron takes") as caught:
        crontab_line(daily, command(tmp_path, "echo", "x" * 1000))
    assert "--env-file" in caught.value.hint
    with pytest.raises(ScheduleError, match="line break"):
        crontab_line(daily, command(tmp_path / "a\nb", "true"))
