"""Scorers: is a completion right, given the expected answer of its row? Pure functions.

An expected answer is a text, an integer, a float, a decimal, a switch, or a list of them of which
any one is right. Where there is none (null, NaN, an empty list), or none that the scorer can use
(``n/a`` for ``number``), the verdict is None: such a row says nothing about the model. A row that
failed has no completion and is not correct.

``exact``
    The completion equals the expected text: white space around both is trimmed, Unicode is
    compared in NFC. An integral float is as good as its integer; switches are ``true`` and
    ``false``, in any case.
``number``
    The last number of the last ``\\boxed{…}``, or else of the completion: see :func:`find_number`.
    Integers are compared exactly; where one of the two has decimals, a relative difference of
    1e-6 is forgiven. A percent sign on one side alone may mean 50 or 0.5.
``choice``
    The option that the completion settles on: see :func:`find_choice`.
``regex``
    The first group (without groups: the whole) of the pattern's last match, compared as ``exact``.
``math``
    Symbolic equality by the library math-verify, which knows LaTeX and ``\\boxed{…}``.

``regex`` and ``math`` can take any time: :class:`batchrun.judge.Judge` runs them under a limit.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from batchrun.scores import Verdict

ScorerName = Literal["exact", "number", "choice", "regex", "math"]

RELATIVE_TOLERANCE = Fraction(1, 10**6)
"""How far numbers with decimals may be apart, relative to the larger one."""

INSTALL_MATH = "pip install math-verify"

_LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_MAX_DIGITS = 1000  # of a number, and the largest exponent: more is no answer, but costs time
_TAIL, _EDGE = 16384, 4 * _MAX_DIGITS
_MAX_BARE_MATH = 200  # characters of a text without LaTeX delimiters that may be one formula


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """How to score: ``pattern`` is for ``regex``, ``choices`` for ``choice`` (none: letters)."""

    scorer: ScorerName
    pattern: str | None = None
    choices: tuple[str, ...] = ()


def score(spec: ScoreSpec, completion: str | None, expected: object) -> bool | None:
    """Whether ``completion`` is right; None where ``expected`` is nothing to compare with."""
    return judge(spec, completion, expected).correct


def judge(spec: ScoreSpec, completion: str | None, expected: object) -> Verdict:
    """:func:`score` together with the answer that was found, for majority votes."""
    answers = list(_alternatives(expected))
    match spec.scorer:
        case "number":
            return _judge_number(completion, answers)
        case "choice":
            return _judge_choice(completion, answers, spec.choices or _LETTERS)
        case _:
            return judge_texts(spec, completion, texts_of(answers))


def judge_texts(spec: ScoreSpec, completion: str | None, texts: Sequence[str]) -> Verdict:
    """What :func:`judge` does for the scorers that compare texts, after :func:`texts_of`."""
    if not texts:
        return Verdict(None)
    if completion is None:
        return Verdict(False)
    if spec.scorer == "math":
        return _judge_math(completion, texts)
    answer: str | None = completion
    if spec.scorer == "regex":
        answer = _last_group(spec.pattern or "", completion)
    if answer is None:
        return Verdict(False)
    answer = _normal(answer)
    return Verdict(answer in {_normal(text) for text in texts}, answer)


def texts_of(expected: object) -> list[str]:
    """Every spelling of the expected answer that counts as equal to it; empty if there is none."""
    return [text for value in _alternatives(expected) for text in _spellings(value)]


def missing_library(spec: ScoreSpec) -> str | None:
    """What is missing for this scorer on this machine, or None."""
    if spec.scorer == "math" and importlib.util.find_spec("math_verify") is None:
        return "the library math-verify is not installed"
    return None


def _alternatives(expected: object) -> Iterator[object]:
    match expected:
        case None:
            return
        case float() if math.isnan(expected):
            return  # data frames say NaN for a gap
        case list() | tuple():
            for item in expected:
                yield from _alternatives(item)
        case _:
            yield expected


def _spellings(value: object) -> tuple[str, ...]:
    match value:
        case str():
            return (value,)
        case bool():
            word = str(value)
            return (word.lower(), word, word.upper())
        case float() if value.is_integer() and abs(value) < 2**63:
            return (str(int(value)), repr(value))
        case Decimal() if value.is_finite():
            plain = format(value, "f")
            short = plain.rstrip("0").rstrip(".") if "." in plain else plain
            return (plain, short)
        case int() | float():
            return (repr(value),)
        case _:
            return ()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def find_boxed(text: str) -> str | None:
    r"""What stands in the last complete ``\boxed{…}`` of ``text``, or None."""
    end = len(text)
    while (start := text.rfind(r"\boxed{", 0, end)) >= 0:
        depth = 0
        for place in range(start + len(r"\boxed"), end):
            if text[place] == "{":
                depth += 1
            elif text[place] == "}":
                depth -= 1
                if depth == 0:
                    return text[start + len(r"\boxed{") : place]
        end = start
    return None


# --- number -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written: ``50%`` has the value 50 and ``percent``."""

    value: Fraction
    percent: bool = False


_SEPARATORS = ",_'’\u00a0\u202f\u2009"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_PLAIN_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_NUMBER = re.compile(
    rf"""
    (?: (?<![A-Za-z0-9_)\]}}])(?P<sign>[+-])\s?(?=[$€£¥₹.0-9])[$€£¥₹]?
      | (?<![A-Za-z0-9_])(?<![0-9]\.)(?<![A-Za-z]\^)(?<![A-Za-z]\^\{{)
    )
    (?:
        (?P<whole>[0-9]+)[ ](?P<top>[0-9]+)\s?/\s?(?P<bottom>[0-9]+)(?![0-9.])
      |
        (?: (?P<digits>(?: [1-9][0-9]?(?:,[0-9]{{2}})+,[0-9]{{3}}(?![0-9])
                         | [1-9][0-9]{{0,2}}(?P<sep>[{_SEPARATORS}])[0-9]{{3}}
                           (?:(?P=sep)[0-9]{{3}})*(?![0-9])
                         | [0-9]+ ))
            (?P<decimals>\.[0-9]+)?
          | (?<![\w.])(?P<only_decimals>\.[0-9]+)
        )
        (?: [eE](?P<exponent>[+-]?[0-9]+)(?![A-Za-z0-9])
          | \s{{0,2}}[×*·x]\s{{0,2}}10\s?(?:\^|\*\*)\s?[{{(]?\s?(?P<ten>[+-]?[0-9]+)\s?[)}}]?
          | \s?(?:\^|\*\*)\s?[{{(]?\s?(?P<power>[+-]?[0-9]+)\s?[)}}]?
        )?
        (?: \s?/\s?(?P<divisor>{_PLAIN_NUMBER})(?![0-9]|\s?/) )?
    )
    (?: \s?(?P<percent>%|percent\b|per\scent\b) )?
    """,
    re.VERBOSE,
)


def find_number(text: str) -> Number | None:
    r"""The last number of ``text``, or of its last ``\boxed{…}`` where that has one.

    Understood are signs (also − and a currency between sign and digits), decimals with a point,
    thousands in groups (``1,234``, ``12,34,567``, ``1_234``, ``1'234``, ``1{,}234``, no-break
    spaces), fractions (``3/4``, ``1 1/2``, ``½``, ``\frac{3}{4}``), scientific notation
    (``1.5e-3``, ``3 × 10^5``, ``3 \times 10^{5}``), integer powers (``2^10``) and percent.
    Digits that a Latin letter precedes are part of a name (``H2O``, ``x1``); a comma is never a
    decimal point.
    """
    boxed = find_boxed(text)
    for part in ([boxed] if boxed is not None else []) + [text]:
        plain = _without_latex(part)
        # A long text is seldom searched as a whole. A match at the very edge may be half a number.
        place, found = _last_number(plain[-_TAIL:])
        if place < _EDGE and len(plain) > _TAIL:
            _, found = _last_number(plain)
        if found is not None:
            return found
    return None


def _last_number(text: str) -> tuple[int, Number | None]:
    place, last = -1, None
    for match in _NUMBER.finditer(text):
        if (number := _number(match)) is not None:
            place, last = match.start(), number
    return place, last


def _without_latex(text: str) -> str:
    """The text with everything in plain characters that numbers are written with."""
    text = re.sub(r"[！-～]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(
        r"([^⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]?)([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)",
        lambda m: f"{m[1]}^{m[2].translate(_SUPERSCRIPTS)}",
        text.replace("−", "-").replace("–", "-"),
    )
    text = re.sub(r"([0-9]?)([¼-¾⅐-⅞])", _vulgar, text).replace("⁄", "/")
    if "\\" not in text and "{" not in text:
        return text
    text = re.sub(
        r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r" \1 ", text
    )
    text = re.sub(r"\\(?:left|right|displaystyle|!)", "", text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\[,;:])(?=[0-9]{3})", ",", text)
    text = re.sub(r"\\([%$#])", r"\1", text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "×", text)
    text = re.sub(
        r"([0-9]?)\s?\\[dtc]?frac\s?(?:\{([^{}]*)\}\s?\{([^{}]*)\}|([0-9])\s?([0-9]))",
        lambda m: f"{m[1]}{' ' if m[1] else ''}{_top_bottom(m)}",
        text,
    )
    return re.sub(r"\\[,;: ]", " ", text)


def _vulgar(match: re.Match[str]) -> str:
    plain = unicodedata.normalize("NFKC", match[2]).replace("⁄", "/")
    return f"{match[1]} {plain}" if match[1] else plain


def _top_bottom(match: re.Match[str]) -> str:
    top, bottom = (match[2], match[3]) if match[2] is not None else (match[4], match[5])
    return f"{top.strip()}/{bottom.strip()}"


def _number(match: re.Match[str]) -> Number | None:
    """The number that ``match`` of the pattern spells; None for one without a sane value."""
    if len(match[0]) > 2 * _MAX_DIGITS:
        return None
    try:
        if match["whole"] is not None:
            value = Fraction(int(match["top"]), int(match["bottom"])) + int(match["whole"])
        else:
            digits = re.sub(rf"[{_SEPARATORS}]", "", match["digits"] or "0")
            value = Fraction(digits + (match["decimals"] or match["only_decimals"] or ""))
            exponent = int(match["exponent"] or match["ten"] or 0)
            power = int(match["power"] or 1)
            if abs(exponent) > _MAX_DIGITS or abs(power) * len(digits) > _MAX_DIGITS:
                return None
            value = value**power * Fraction(10) ** exponent
            if match["divisor"] is not None:
                value /= Fraction(match["divisor"])
    except (ZeroDivisionError, ValueError):
        return None
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None)


def _as_number(value: object) -> Number | None:
    match value:
        case bool():
            return None
        case int():
            return Number(Fraction(value)) if abs(value) < 10**_MAX_DIGITS else None
        case float():
            return Number(Fraction(repr(value))) if math.isfinite(value) else None
        case Decimal():
            return Number(Fraction(value)) if value.is_finite() else None
        case str():
            return find_number(value)
        case _:
            return None


def _judge_number(completion: str | None, answers: Sequence[object]) -> Verdict:
    wanted = [number for number in map(_as_number, answers) if number is not None]
    if not wanted:
        return Verdict(None)
    found = None if completion is None else find_number(completion)
    if found is None:
        return Verdict(False)
    name = f"{found.value}{'%' if found.percent else ''}"
    return Verdict(any(_same_number(found, number) for number in wanted), name)


def _same_number(first: Number, second: Number) -> bool:
    if _close(first.value, second.value):
        return True
    if first.percent == second.percent:
        return False
    percent, other = (first, second) if first.percent else (second, first)
    return _close(percent.value / 100, other.value)


def _close(first: Fraction, second: Fraction) -> bool:
    if first.denominator == 1 and second.denominator == 1:
        return first == second
    return abs(first - second) <= RELATIVE_TOLERANCE * max(abs(first), abs(second))


# --- choice -----------------------------------------------------------------------------------

_PHRASE = (
    r"(?:\b(?:answers?|choice|option|choose|select|pick)\b"
    r"(?:[ \t]*(?:[:=]|->|→|\b(?:is|are|was|would|should|must|be|the|it|option|choice|letter"
    r"|answer|correct|best|right|final|clearly|definitely|therefore|likely|most|indeed)\b)"
    r"|\s*[:=]\s*)*"
    r")"
)


def find_choice(text: str, choices: Sequence[str] = _LETTERS) -> str | None:
    r"""The one of ``choices`` that ``text`` settles on, or None. The first that applies:

    1. the last ``\boxed{…}`` is an option (``\boxed{B}``, ``\boxed{\text{(B)}}``);
    2. the last phrase that names one: ``The answer is B``, ``Answer: (B)``, ``Option B``,
       ``B is correct``;
    3. the text is an option alone, in any case, or begins with one, and no other line begins
       with another: ``b``, ``(B)``, ``B. Paris``, ``B) Paris``;
    4. the last option that stands by itself; of single letters capitals alone, and not the words
       "A" and "I".

    Quotes, brackets, ``$`` and the marks of Markdown and LaTeX around an option do not matter.
    Case does not either, where an option is more than one letter.
    """
    labels = {_normal(choice).casefold(): choice for choice in choices}
    boxed = find_boxed(text)
    if boxed is not None:
        inside = _without_marks(boxed)
        if found := labels.get(_bare(inside)) or _leading(inside, labels):
            return found
    plain = _without_marks(text)
    if found := _named(plain, labels):
        return found
    if found := labels.get(_bare(plain)):
        return found
    lines = [_leading(line, labels) for line in plain.splitlines()]
    starts = {label for label in lines if label is not None}
    if len(starts) == 1 and lines[0] is not None:
        return lines[0]
    return _last_alone(plain, labels)


def _without_marks(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    text = re.sub(
        r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1", text
    )
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\*\*|__|[`$]|\\[()\[\]]", "", text).strip()


def _bare(text: str) -> str:
    """The text without punctuation around it, to look up."""
    return text.strip(" \t\r\n.,;:!()[]{}<>\"'“”‘’*_").casefold()


def _options(labels: dict[str, str]) -> str:
    """A pattern for any of the labels, longer ones first."""
    # Folding can change letters (ß -> ss), so each stands there as it was written too.
    written = {*labels, *map(_normal, labels.values())}
    return "|".join(re.escape(label) for label in sorted(written, key=len, reverse=True))


def _single_letters(labels: dict[str, str]) -> bool:
    return all(len(label) == 1 and label.isalpha() for label in labels)


def _named(text: str, labels: dict[str, str]) -> str | None:
    options = _options(labels)
    after = re.compile(rf"{_PHRASE}\s?[(\[\"'“‘]*(?P<label>{options})(?!['’-]?\w)", re.IGNORECASE)
    before = re.compile(
        rf"(?<![\w'’])(?P<label>{options})[)\]\"'”’]*\s+is\s+(?:the\s+)?"
        r"(?:correct|right|best|true|final)\b",
        re.IGNORECASE,
    )
    single = _single_letters(labels)
    last: tuple[int, str] | None = None
    for pattern in (after, before):
        for match in pattern.finditer(text):
            label = labels.get(match["label"].casefold())
            if label is None or (single and _is_a_word(text, match)):
                continue
            if last is None or match.end() > last[0]:
                last = match.end(), label
    return last[1] if last is not None else None


def _is_a_word(text: str, match: re.Match[str]) -> bool:
    """Whether what looks like a letter to choose is a word: "the answer is a bit", "is I think"."""
    goes_on = re.match(r"\s+[a-z]", text[match.end("label") : match.end("label") + 8]) is not None
    return goes_on and (match["label"].islower() or match["label"] == "I")


def _leading(line: str, labels: dict[str, str]) -> str | None:
    match = re.match(
        rf"\s*(?:\((?P<a>{_options(labels)})\)|(?P<b>{_options(labels)})[.):])(?=\s|$)",
        line,
        re.IGNORECASE,
    )
    return labels.get((match["a"] or match["b"]).casefold()) if match else None


def _last_alone(text: str, labels: dict[str, str]) -> str | None:
    last: str | None = None
    single = _single_letters(labels)
    for match in re.finditer(rf"(?<![\w'’])({_options(labels)})(?![\w'’])", text, re.IGNORECASE):
        word = match[1]
        rest = text[match.end() : match.end() + 2]
        if single and (word.islower() or (word in "AI" and re.match(r"\s[a-z]", rest))):
            continue
        last = labels.get(word.casefold(), last)
    return last


def _as_choice(value: object, choices: Sequence[str]) -> str | None:
    labels = {_normal(choice).casefold(): choice for choice in choices}
    for text in _spellings(value):
        plain = _normal(text).casefold()
        if found := labels.get(plain) or labels.get(_bare(plain)) or _leading(text, labels):
            return found
    match value:
        case bool():
            return labels.get("yes" if value else "no")
        case int() | float() if 0 <= value < len(choices) and value == int(value):
            return choices[int(value)]
        case _:
            return None


def _judge_choice(
    completion: str | None, answers: Sequence[object], choices: Sequence[str]
) -> Verdict:
    wanted = {_as_choice(value, choices) for value in answers} - {None}
    if not wanted:
        return Verdict(None)
    found = None if completion is None else find_choice(completion, choices)
    return Verdict(found in wanted, found)


# --- regex, math ------------------------------------------------------------------------------


def _last_group(pattern: str, text: str) -> str | None:
    last: re.Match[str] | None = None
    for match in re.finditer(pattern, text):
        last = match
    if last is None:
        return None
    group: str | None = last.group(min(1, last.re.groups))
    return group


def _judge_math(completion: str, texts: Sequence[str]) -> Verdict:
    import math_verify

    # Its own time limits need the main thread; the limit is set by whoever calls this.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parsed(text: str) -> list[object]:
        return list(math_verify.parse(text, parsing_timeout=None))

    readings = [reading for reading in map(parsed, _as_formulas(completion)) if reading]
    plain = _math_text(completion)
    name = str(readings[0][0]) if readings else plain
    for text in texts:
        if _math_text(text) == plain:
            return Verdict(True, name)
        for wanted in filter(None, map(parsed, _as_formulas(text))):
            for reading in readings:
                if math_verify.verify(wanted, reading, timeout_seconds=None):
                    return Verdict(True, name)
    return Verdict(False, name)


def _as_formulas(text: str) -> list[str]:
    """What to parse: a short text without LaTeX delimiters may be a formula as it stands."""
    text = text.strip()
    if re.search(r"\$|\\boxed|\\\(|\\\[", text):
        return [text]
    if "\n" in text or len(text) > _MAX_BARE_MATH:
        return [text]
    return [f"${text}$", text]


def _math_text(text: str) -> str:
    """The answer as a text, for those that are no formula (``\\text{Monday}``)."""
    boxed = find_boxed(text)
    return "".join(_bare(_without_marks(text if boxed is None else boxed)).split())
