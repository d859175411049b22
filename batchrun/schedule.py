"""When a job runs: the cron expressions that a job may have, and the crontab line made of one.

Debian's cron, cronie and Kubernetes read five fields alike but for some corners: names in lists and
ranges, 7 for Sunday, macros, a step without a range, ``*/n`` in one day field beside the other.
What all of them read alike is taken, names and macros are written out as numbers, and the corners
in which they differ are refused.
"""

from __future__ import annotations

import calendar
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from batchrun.wording import join_or, nearest, quoted

MAX_LINE = 990
"""Characters of a crontab line; Debian's cron refuses commands of 1,000."""

_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MONTHS = tuple(name.lower() for name in calendar.month_abbr)
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_ITEM = re.compile(r"(?P<first>\*|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\w+))?", re.ASCII)
_LEAP_YEAR = 2000
# 29 February is the rarest day there is: it can be eight years away.
_MAX_DAYS = 9 * 366


class ScheduleError(ValueError):
    """An expression that is no schedule: ``message`` says why, ``hint`` how to mend it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, slots=True)
class _Field:
    """One of the five fields: its name, its bounds, and the names that values have."""

    name: str
    least: int
    most: int
    names: Mapping[str, int] = field(default_factory=dict)


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of month", 1, 31),
    _Field("month", 1, 12, {name: number for number, name in enumerate(_MONTHS) if name}),
    _Field("day of week", 0, 7, {name: number for number, name in enumerate(_DAYS)}),
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """A cron expression that is understood.

    ``text`` is the expression in numbers alone, which every cron reads alike. The sets hold the
    values of its fields; ``weekdays`` counts from 0 for Sunday. Where both day fields are bound
    (``either_day``), a day of either is a day of the schedule, as in every cron.
    """

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool

    def includes(self, day: date) -> bool:
        """Whether the schedule has a time on ``day``."""
        if day.month not in self.months:
            return False
        by_date, by_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return by_date or by_weekday if self.either_day else by_date and by_weekday

    def times_after(self, moment: datetime, zone: tzinfo | None = None) -> Iterator[datetime]:
        """The times after ``moment`` (aware), in ``zone`` or in that of ``moment``.

        A time that the clock leaps over is not among them, one that it shows twice is there once.
        """
        zone = zone or moment.tzinfo
        start = moment.astimezone(zone)
        for ahead in range(_MAX_DAYS):
            day = start.date() + timedelta(days=ahead)
            if not self.includes(day):
                continue
            for hour in sorted(self.hours):
                for minute in sorted(self.minutes):
                    tick = datetime.combine(day, time(hour, minute), zone)
                    exists = tick.astimezone(UTC).astimezone(zone).hour == hour
                    if exists and tick.astimezone(UTC) > moment:
                        yield tick


def parse_schedule(text: str) -> Schedule:
    """The schedule that a cron expression means.

    Raises:
        ScheduleError: It is none, it never comes, or not every cron reads it alike.
    """
    words = text.split()
    if text.strip().startswith("@"):
        words = _macro(text.strip()).split()
    if len(words) != len(_FIELDS):
        given = "1 field" if len(words) == 1 else f"{len(words)} fields"
        raise ScheduleError(
            f"has {given}, not 5 (minute, hour, day of month, month, day of week): {quoted(text)}",
            'write for example "0 2 * * *" for two o\'clock every night',
        )
    parsed = [_parse_field(word, of) for word, of in zip(words, _FIELDS, strict=True)]
    minutes, hours, days, months, weekdays = (values for _, values in parsed)
    day_word, weekday_word = words[2], words[4]
    _check_day_fields(day_word, weekday_word)
    if weekday_word == "*":
        longest = max(calendar.monthrange(_LEAP_YEAR, month)[1] for month in months)
        if min(days) > longest:
            raise ScheduleError(
                f"never comes: no such month has a day {min(days)}",
                "write a day that the month has",
            )
    return Schedule(
        " ".join(written for written, _ in parsed),
        minutes,
        hours,
        days,
        months,
        weekdays,
        either_day=day_word != "*" and weekday_word != "*",
    )


def _macro(text: str) -> str:
    if text.lower() in _MACROS:
        return _MACROS[text.lower()]
    close = nearest(text, _MACROS)
    known = join_or([name for name in _MACROS if name not in ("@midnight", "@annually")])
    raise ScheduleError(
        f"{quoted(text)} is no time that cron and Kubernetes both know",
        f"did you mean {close}?" if close else f"write five fields, or one of {known}",
    )


def _check_day_fields(day: str, weekday: str) -> None:
    # With */2 beside another day field one cron takes days of both, another days of either.
    for word, other, span, name in (
        (day, weekday, "1-31", "day of month"),
        (weekday, day, "0-6", "day of week"),
    ):
        if word.startswith("*/") and other != "*":
            raise ScheduleError(
                f"the {name} {quoted(word)} beside another day field means one thing to one cron "
                "and something else to another",
                f"write {span}{word[1:]}, with which a day of either field is meant",
            )


def _parse_field(word: str, of: _Field) -> tuple[str, frozenset[int]]:
    """One field in numbers, and its values."""
    written: list[str] = []
    values: set[int] = set()
    for item in word.split(","):
        text, found = _parse_item(item, of)
        written.append(text)
        values |= found
    return ",".join(written), frozenset(values)


def _parse_item(item: str, of: _Field) -> tuple[str, set[int]]:
    match = _ITEM.fullmatch(item)
    if match is None or (match["first"] == "*" and match["last"] is not None):
        raise ScheduleError(
            f"the {of.name} {quoted(item)} is no number, range, list or step",
            f"write a number of {of.least} to {of.most}, a range such as "
            f"{of.least}-{of.least + 4}, a list with commas, or *",
        )
    first, last, step = match["first"], match["last"], match["step"]
    low = of.least if first == "*" else _number(first, of)
    is_weekday = of.most == 7
    top = 6 if is_weekday else of.most
    high = top if first == "*" else _number(last, of) if last is not None else low
    if step is not None and first != "*" and last is None:
        hint = f"write {low}-{top}/{step}"
        raise ScheduleError(f"the {of.name} {quoted(item)} has a step and no range", hint)
    if high < low:
        hint = f"write {low}-{top},{of.least}-{high}"
        raise ScheduleError(
            f"the {of.name} {quoted(item)} is a range that ends before it begins", hint
        )
    by = _step(step, of, high - low) if step is not None else 1
    numbers = range(low, high + 1, by)
    if is_weekday and high == 7:
        # Kubernetes knows Sunday as 0 alone.
        return ",".join(str(number % 7) for number in numbers), {n % 7 for n in numbers}
    if first == "*":
        return "*" + (f"/{by}" if step is not None else ""), set(numbers)
    text = f"{low}-{high}" if last is not None else f"{low}"
    return text + (f"/{by}" if step is not None else ""), set(numbers)


def _number(word: str, of: _Field) -> int:
    if word.lower() in of.names:
        return of.names[word.lower()]
    if not word.isdigit():
        close = nearest(word, of.names)
        also = f", or {next(iter(of.names))} and so on" if of.names else ""
        raise ScheduleError(
            f"the {of.name} {quoted(word)} is no number",
            f"did you mean {close}?" if close else f"write {of.least} to {of.most}{also}",
        )
    number = int(word[:6])
    if not of.least <= number <= of.most:
        raise ScheduleError(
            f"the {of.name} is {number}, which is not within {of.least} to {of.most}",
            f"write {of.least} to {of.most}",
        )
    return number


def _step(word: str, of: _Field, span: int) -> int:
    step = int(word[:6]) if word.isdigit() else 0
    if not 1 <= step <= max(span, 1):
        raise ScheduleError(
            f"the {of.name} has the step {quoted(word)}, which is not within 1 to {max(span, 1)}",
            "write how many to go on by, for example */5",
        )
    return step


@dataclass(frozen=True, slots=True)
class CronCommand:
    """What cron runs: ``command`` (program and arguments, absolute paths) in ``folder``.

    Output goes to ``log_folder``/``name``-<date>.log; logs of more than ``keep_days`` days are
    deleted. ``environ`` is written into the line, ``env_file`` is read by the shell each time.
    """

    name: str
    folder: str
    command: Sequence[str]
    log_folder: str
    keep_days: int
    environ: Mapping[str, str] = field(default_factory=dict)
    env_file: str | None = None


def crontab_line(schedule: Schedule, what: CronCommand) -> str:
    """The line of a crontab: fields, then a command for ``sh``.

    Cron mails what the command prints, and it prints only when somebody has to act: exit code 0 is
    success, 4 says that the last run is still alive, 75 that the next one resumes.

    Raises:
        ScheduleError: A path has a line break, or the line is longer than cron takes.
    """
    line = f"{schedule.text} {shell_command(what).replace('%', chr(92) + '%')}"
    if not line.isprintable():
        hint = "rename the folder, or put the variable into --env-file"
        raise ScheduleError("a crontab line cannot hold a line break or control character", hint)
    if len(line) > MAX_LINE:
        raise ScheduleError(
            f"the crontab line has {len(line)} characters, more than cron takes ({MAX_LINE})",
            "put variables into a file that --env-file names, or use shorter paths",
        )
    return line


def shell_command(what: CronCommand) -> str:
    """The command of :func:`crontab_line`, as ``sh -c`` takes it."""
    logs, pattern = shlex.quote(what.log_folder), shlex.quote(f"{what.name}-????-??-??.log")
    steps = [
        f"cd {shlex.quote(what.folder)} && mkdir -p {logs} || exit 1",
        f"find {logs} -name {pattern} -mtime +{what.keep_days} -delete",
        f"log={shlex.quote(f'{what.log_folder}/{what.name}')}-$(date +%F).log",
    ]
    if what.env_file is not None:
        steps.append(f"set -a; . {shlex.quote(what.env_file)} || exit 1; set +a")
    given = "".join(f"{name}={shlex.quote(value)} " for name, value in what.environ.items())
    steps.append(f'{given}{shlex.join(what.command)} >>"$log" 2>&1')
    failed = f"{what.name}: batchrun ended with exit code "
    steps.append(
        f"code=$?; case $code in 0|4|75) ;; *) echo {shlex.quote(failed)}$code, see $log; "
        'tail -n 20 "$log"; exit $code;; esac'
    )
    return "; ".join(steps)
