"""What one scalar of a job file means: environment variables first, then its type.

``${VAR}`` and ``${VAR:-default}`` read the environment; ``$${`` is a literal ``${``. Types are
those of YAML 1.1 without its surprises: dates, base-60 and octal numbers stay text, ``1e-3`` is a
number, and numbers that nothing can hold are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

_VARIABLE = re.compile(
    r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<fallback>:-(?P<default>[^}]*))?\}|\$\{"
)
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_SWITCHES = {
    word: value
    for words, value in (("true yes on", True), ("false no off", False))
    for lower in words.split()
    for word in (lower, lower.capitalize(), lower.upper())
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_HEXADECIMAL = re.compile(r"[-+]?0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_MAX_DIGITS = 40


class ScalarError(ValueError):
    """A scalar that has no value: ``message`` says why, ``hint`` how to mend it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint


def expand_variables(text: str, environ: Mapping[str, str]) -> str:
    """``text`` with its variables replaced. Raises ScalarError for one that is not set."""

    def value_of(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name = match["name"]
        if name is None:
            raise ScalarError(
                "has a `${` that names no variable",
                "write ${NAME} or ${NAME:-default}, or $${ for a literal ${",
            )
        if match["fallback"] is not None:
            return environ.get(name) or match["default"]
        if name not in environ:
            raise ScalarError(
                f"the environment variable {name} is not set",
                f"export {name}=…, or give a default: ${{{name}:-…}}",
            )
        return environ[name]

    return _VARIABLE.sub(value_of, text)


def parse_scalar(text: str) -> object:
    """The value of a plain (not quoted) scalar: null, bool, int, float or the text itself.

    Raises:
        ScalarError: It is a number that is not finite or that no key can hold.
    """
    if text in _NULL:
        return None
    if text in _SWITCHES:
        return _SWITCHES[text]
    if _LEADING_ZERO.fullmatch(text):
        return text
    if _INTEGER.fullmatch(text) or _HEXADECIMAL.fullmatch(text):
        # Refused before int() works on a quarter of a megabyte of digits.
        if len(text) > _MAX_DIGITS:
            raise ScalarError(f"is a number of more than {_MAX_DIGITS} digits", _NO_NUMBER)
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        number = float(text.replace("_", ""))
        if math.isinf(number):
            raise ScalarError("is a number too large to be held", _NO_NUMBER)
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ScalarError(f"{text} is not a finite number", _NO_NUMBER)
    return text


_NO_NUMBER = "write a smaller number, or put quotes around a text"
