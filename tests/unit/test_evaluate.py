"""Scorers: what counts as a right answer."""

from __future__ import annotations

import unicodedata
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.evaluate import (
    RELATIVE_TOLERANCE,
    ScoreSpec,
    find_boxed,
    find_choice,
    find_number,
    judge,
    score,
    texts_of,
)
from batchrun.scores import Verdict

EXACT, NUMBER, CHOICE = ScoreSpec("exact"), ScoreSpec("number"), ScoreSpec("choice")
MATH = ScoreSpec("math")
ALL = (EXACT, NUMBER, CHOICE, ScoreSpec("regex", pattern=r"(\S+)"), MATH)


# --- what is expected -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.scorer)
@pytest.mark.parametrize("expected", [None, float("nan"), [], [None], [[], None]])
def test_without_an_expected_answer_there_is_no_verdict(spec: ScoreSpec, expected: object) -> None:
    """A row with null, a gap or an empty list is neither right nor wrong, whatever it says."""
    assert judge(spec, "42", expected) == Verdict(None)
    assert judge(spec, None, expected) == Verdict(None)


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.scorer)
def test_a_failed_row_is_not_correct(spec: ScoreSpec) -> None:
    """A row without a completion is wrong, and has no vote."""
    assert judge(spec, None, "7" if spec is not CHOICE else "B") == Verdict(False)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (NUMBER, "n/a"),
        (NUMBER, True),
        (NUMBER, float("inf")),
        (CHOICE, "Paris"),
        (CHOICE, 26),
        (CHOICE, -1),
        (CHOICE, 0.5),
        (ScoreSpec("choice", choices=("a", "b")), "c"),
    ],
)
def test_what_a_scorer_cannot_use_is_no_expected_answer(spec: ScoreSpec, expected: object) -> None:
    """An expected value that is no number, or none of the options, gives no verdict."""
    assert score(spec, "42 B", expected) is None


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.scorer)
def test_any_of_a_list_is_right(spec: ScoreSpec) -> None:
    """Of several expected answers each one counts; nulls among them do not."""
    one, other = ("B", "C") if spec is CHOICE else ("7", "8")
    assert score(spec, other, [one, None, other]) is True
    assert score(spec, other, (one, [other])) is True
    assert score(spec, other, [one, None]) is False


@pytest.mark.parametrize(
    ("expected", "texts"),
    [
        ("a", ["a"]),
        (7, ["7"]),
        (7.0, ["7", "7.0"]),
        (0.5, ["0.5"]),
        (1e300, ["1e+300"]),
        (Decimal("1.50"), ["1.50", "1.5"]),
        (Decimal("100"), ["100", "100"]),
        (True, ["true", "True", "TRUE"]),
        (["a", 1], ["a", "1"]),
        ({"a": 1}, []),
        (Decimal("NaN"), []),
    ],
)
def test_spellings_of_an_expected_answer(expected: object, texts: list[str]) -> None:
    """Values of a column as the texts that equal them."""
    assert texts_of(expected) == texts


# --- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected", "right"),
    [
        ("42", "42", True),
        (" 42\n", "42", True),
        ("42", " 42 ", True),
        ("42.", "42", False),
        ("Paris", "paris", False),
        ("", "", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("42", 42, True),
        ("42", 42.0, True),
        ("42.0", 42.0, True),
        ("0.5", 0.5, True),
        ("True", True, True),
        ("false", False, True),
        ("1", True, False),
        ("1.5", Decimal("1.50"), True),
    ],
)
def test_exact(completion: str, expected: object, right: bool) -> None:
    """Texts are equal but for white space around them and how Unicode composes letters."""
    assert score(EXACT, completion, expected) is right


@given(st.text(), st.text())
def test_exact_is_equality_of_normal_texts(first: str, second: str) -> None:
    """``exact`` holds for a text and itself in any composition, and for no other."""
    same = (
        unicodedata.normalize("NFC", first).strip() == unicodedata.normalize("NFC", second).strip()
    )
    assert score(EXACT, first, second) is same
    assert score(EXACT, f" \n{unicodedata.normalize('NFD', first)}\t", first) is True


# --- number -----------------------------------------------------------------------------------

NUMBERS = [
    ("42", "42"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("+7", "7"),
    ("x=-5", "-5"),
    ("between 3 and -2", "-2"),
    ("3-5", "5"),
    ("pages 9–12", "12"),
    ("10 - 3 = 7", "7"),
    ("(-4)", "-4"),
    ("3.14", "157/50"),
    (".5", "1/2"),
    ("-.5", "-1/2"),
    ("It is 5.", "5"),
    ("No.5", "5"),
    ("5!", "5"),
    ("1,234", "1234"),
    ("1,234,567.89", "123456789/100"),
    ("12,34,567", "1234567"),
    ("1_000_000", "1000000"),
    ("1'234'567", "1234567"),
    ("1\u202f234", "1234"),
    ("1{,}234", "1234"),
    (r"1\,234", "1234"),
    ("(3,5)", "5"),
    ("0,500", "500"),
    ("1,2345", "2345"),
    ("$18.00", "18"),
    ("-$5.50", "-11/2"),
    ("€1,000", "1000"),
    ("12 apples.", "12"),
    ("5km", "5"),
    ("5 m²", "5"),
    ("5 cm^2", "5"),
    ("H2O has 3 atoms", "3"),
    ("x_1 = 7", "7"),
    ("x1", None),
    ("答案是5", "5"),
    ("５０", "50"),
    ("3/4", "3/4"),
    ("-3/4", "-3/4"),
    ("1 1/2", "3/2"),
    ("½", "1/2"),
    ("1½", "3/2"),
    ("1⁄2", "1/2"),
    (r"\frac{3}{4}", "3/4"),
    (r"-\frac{1}{2}", "-1/2"),
    (r"\dfrac34", "3/4"),
    (r"2\frac{1}{2}", "5/2"),
    (r"$\frac{ 1 }{ 3 }$", "1/3"),
    ("1.5e-3", "3/2000"),
    ("2E6", "2000000"),
    ("3 × 10^5", "300000"),
    ("3×10⁵", "300000"),
    (r"3 \times 10^{5}", "300000"),
    (r"3 \cdot 10^{-2}", "3/100"),
    ("3 * 10**5", "300000"),
    ("10^{-3}", "1/1000"),
    ("2^10", "1024"),
    ("50%", "50"),
    (r"50\%", "50"),
    ("50 percent", "50"),
    ("**42**", "42"),
    ("#### 72", "72"),
    ("2+3=5\n#### 1,000", "1000"),
    (r"\boxed{42}, found in 3 ways", "42"),
    (r"\boxed{7} and then \boxed{8}", "8"),
    (r"\boxed{none} or 9", "9"),
    (r"\boxed{\text{12 cm}}", "12"),
    (r"\boxed{\frac{\text{3}}{4}}", "3/4"),
    (r"\boxed{5", "5"),
    ("1/0", None),
    ("6, or 1/0", "6"),
    ("1e999999999", None),
    ("9^999999999", None),
    ("9" * 5000, None),
    ("no number", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS, ids=[text[:30] for text, _ in NUMBERS])
def test_numbers_as_people_write_them(text: str, value: str | None) -> None:
    """The last number of a text, in every notation that models and data sets use."""
    found = find_number(text)
    assert (None if found is None else found.value) == (None if value is None else Fraction(value))


def test_the_last_number_of_a_long_text() -> None:
    """A number is found wherever it stands in a long text, and never half of it."""
    assert find_number("7 " + "word " * 20_000).value == 7  # type: ignore[union-attr]
    assert find_number("word " * 20_000 + "8").value == 8  # type: ignore[union-attr]
    for rest in range(16_370, 16_390):
        assert find_number("123456789" + "x " * (rest // 2) + "x" * (rest % 2)).value == 123456789  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("completion", "expected", "right"),
    [
        ("The answer is 1,234.", 1234, True),
        ("1234.0", 1234, True),
        ("1234.5", 1234, False),
        ("1000001", 1000000, False),
        ("0.333333", "1/3", True),
        ("0.33333", "1/3", False),
        ("0.1", 0.1, True),
        ("0.1", 0.10000000149011612, True),
        ("2.50", Decimal("2.5"), True),
        ("72", "48/2 = 24, 48+24 = 72\n#### 72", True),
        ("50%", 50, True),
        ("50%", 0.5, True),
        ("0.5", "50%", True),
        ("50", "50%", True),
        ("50%", "50%", True),
        ("0.5%", "50%", False),
        ("5", -5, False),
        ("none", 0, False),
    ],
)
def test_numbers_are_compared_by_value(completion: str, expected: object, right: bool) -> None:
    """Integers exactly, others within a millionth; a percent sign may be left out."""
    assert score(NUMBER, completion, expected) is right


@given(st.integers(-(10**30), 10**30))
def test_every_spelling_of_an_integer_is_that_integer(number: int) -> None:
    """Plain, grouped and decorated, an integer is itself and not its neighbour."""
    for text in (f"{number}", f"{number:,}", f"{number:_}", f"so ${number}$.", f"{number}.0"):
        assert score(NUMBER, text, number) is True, text
        assert score(NUMBER, text, number + 1) is False, text


@given(st.fractions(max_denominator=10**6), st.floats(allow_nan=False, allow_infinity=False))
def test_every_fraction_and_float_is_itself(fraction: Fraction, number: float) -> None:
    """What Python writes is read as the same value."""
    found = find_number(f"It is {fraction}")
    assert found is not None and found.value == fraction
    assert find_number(rf"\frac{{{fraction.numerator}}}{{{fraction.denominator}}}") is not None
    assert score(NUMBER, repr(number), number) is True


@given(st.decimals(min_value=1, max_value=10**9, places=3), st.booleans())
def test_the_tolerance_is_a_millionth(number: Decimal, more: bool) -> None:
    """Half a tolerance away is right, two tolerances away is wrong."""
    exact = Fraction(number) + Fraction(1, 3)
    for factor, right in ((Fraction(1, 2), True), (Fraction(2), False)):
        step = exact * RELATIVE_TOLERANCE * factor
        other = exact + step if more else exact - step
        assert score(NUMBER, f"{other}", f"{exact}") is right


# --- choice -----------------------------------------------------------------------------------

CHOICES = [
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("B.", "B"),
    ("**B**", "B"),
    ("`B`", "B"),
    (" B \n", "B"),
    ("The answer is B.", "B"),
    ("the answer is b", "B"),
    ("The correct answer is (C) because A is wrong.", "C"),
    ("Answer: B", "B"),
    ("**Answer:** B", "B"),
    ("Answer: **B**", "B"),
    ("ANSWER: (D)", "D"),
    ("Answer:\nC", "C"),
    ("Final answer: $\\boxed{E}$", "E"),
    (r"\boxed{B}", "B"),
    (r"\boxed{\text{(B)}}", "B"),
    (r"$\boxed{\mathrm{C}}$", "C"),
    (r"\boxed{B) 12}", "B"),
    (r"\boxed{A} no: \boxed{D}", "D"),
    (r"The answer is A. \boxed{B}", "B"),
    (r"\boxed{12} is what (C) says", "C"),
    ("Final answer: \\textbf{D}", "D"),
    ("Option D is correct", "D"),
    ("B is the correct answer, not A", "B"),
    ("the answer is option 'C'", "C"),
    ("I choose E", "E"),
    ("The best option is: (A)", "A"),
    ("The answer is A because B is wrong", "A"),
    ("First I thought the answer is A. But the answer is C.", "C"),
    ("B. Paris", "B"),
    ("B) Paris is in France, A) is not", "B"),
    ("(B) Paris", "B"),
    ("A) no\nB) yes", "B"),
    ("A is wrong. B is wrong. So C", "C"),
    ("I think it is B", "B"),
    ("A good question. I do not know", None),
    ("the answer is a bit unclear", None),
    ("I give up", None),
    ("ABBA", None),
    ("12", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "label"), CHOICES, ids=[text[:40] for text, _ in CHOICES])
def test_choices_as_models_write_them(text: str, label: str | None) -> None:
    """The letter that a text settles on, and none where it settles on none."""
    assert find_choice(text) == label


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("billing", "billing"),
        ("Billing.", "billing"),
        ("It is about billing, not delivery. Answer: BILLING", "billing"),
        ("not billing but delivery", "delivery"),
        ("I love new york", "New York"),
        ("York", "York"),
        ("Straße", "STRASSE"),
        (r"\boxed{\text{New York}}", "New York"),
        ("rebilling", None),
        ("", None),
    ],
)
def test_choices_of_whole_words(text: str, option: str | None) -> None:
    """Given options are found in any case, as whole words, the longer one first."""
    options = ("billing", "delivery", "York", "New York", "STRASSE")
    assert find_choice(text, options) == option


@pytest.mark.parametrize(
    ("completion", "expected", "choices", "right"),
    [
        ("B", "B", (), True),
        ("B", " b ", (), True),
        ("B", "(B)", (), True),
        ("B", "B. Paris", (), True),
        ("B", 1, (), True),
        ("B", 1.0, (), True),
        ("A", 1, (), False),
        ("2", 2, ("1", "2"), True),
        ("yes", True, ("yes", "no"), True),
        ("no", False, ("yes", "no"), True),
        ("True", True, ("True", "False"), True),
        ("fault", 2, ("billing", "delivery", "fault"), True),
    ],
)
def test_expected_choices(
    completion: str, expected: object, choices: tuple[str, ...], right: bool
) -> None:
    """Expected options are letters, their texts, booleans or indices from 0."""
    assert score(ScoreSpec("choice", choices=choices), completion, expected) is right


@given(
    st.sampled_from("ABCDEFGHJKLMNOPQRSTUVWXYZ"),
    st.sampled_from(
        ["{}", "({})", "The answer is {}.", "Answer: {}", r"\boxed{{{}}}", "{}. Because.", "**{}**"]
    ),
)
def test_every_letter_in_every_form(letter: str, form: str) -> None:
    """Each letter is understood in each usual form, and no other letter is."""
    assert find_choice(form.format(letter)) == letter


# --- regex ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "completion", "answer"),
    [
        (r"Answer: (\w+)", "Answer: a, no, Answer: b", "b"),
        (r"\d+", "1 22 333", "333"),
        (r"(?i)answer: (\w+)", "ANSWER: x", "x"),
        (r"<(\w+)>|(\w+)$", "<a> b", None),
        (r"(x) (y)", "x y", "x"),
        (r"\d+", "none", None),
        (r"=(.*)", "= 5 ", "5"),
    ],
)
def test_regex(pattern: str, completion: str, answer: str | None) -> None:
    """The first group of the last match is the answer; no match is a wrong answer."""
    spec = ScoreSpec("regex", pattern=pattern)
    assert judge(spec, completion, answer or "5") == Verdict(answer is not None, answer)


# --- math -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected", "right"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac12}", 0.5, True),
        (r"So the result is $\frac{\sqrt{3}}{3}$.", r"\frac{1}{\sqrt{3}}", True),
        (r"\boxed{2(x+1)}", "2x+2", True),
        ("x^2+2x+1", "$(x+1)^2$", True),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", True),
        (r"\boxed{[0, 1)}", r"$[0,1)$", True),
        (r"\boxed{\text{Monday}}", "Monday", True),
        (r"Thus \(x = 3\).", 3, True),
        (r"\boxed{12}", r"A long solution: $3 \cdot 4$ gives \boxed{12}.", True),
        (r"\boxed{13}", "12", False),
        ("no idea", "12", False),
        ("", "12", False),
        (r"\boxed{\frac{1}{3}}", "0.5", False),
        (r"\boxed{(1, 2)}", "(2, 1)", False),
        (r"\boxed{", "3", False),
    ],
)
def test_math(completion: str, expected: object, right: bool) -> None:
    """Formulas are compared by what they mean, in LaTeX and plain."""
    assert score(MATH, completion, expected) is right


def test_equal_formulas_have_one_vote() -> None:
    """Spellings of a value count as one answer in majority votes."""
    texts = [r"\boxed{\frac12}", r"It is $\frac{1}{2}$."]
    assert {judge(MATH, text, "1").answer for text in texts} == {"1/2"}
    assert {judge(NUMBER, text, "1").answer for text in ("1,000", "1000.0", "$10^3$")} == {"1000"}
    assert {judge(CHOICE, text, "A").answer for text in ("B", "b", "Answer: (B)")} == {"B"}


# --- all --------------------------------------------------------------------------------------

PIECES = [*"0123456789.,-+/^%eE(){}[]$ABab \n\\×½²′", "\\boxed{", "\\frac{", "answer is "]
NASTY = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


@settings(max_examples=300)
@given(NASTY | st.text(), NASTY | st.integers() | st.floats() | st.booleans() | st.none())
def test_no_text_breaks_a_scorer(completion: str, expected: object) -> None:
    """Whatever a model or a data set holds, quick scorers have a verdict, the same one twice."""
    for spec in (EXACT, NUMBER, CHOICE, ScoreSpec("choice", choices=("yes", "no", "ı"))):
        verdict = judge(spec, completion, expected)
        assert verdict.correct in (True, False, None)
        assert judge(spec, completion, expected) == verdict


@given(NASTY)
def test_what_is_expected_is_right(text: str) -> None:
    """A completion that is the expected text itself is right, wherever it can be used at all."""
    for spec in (EXACT, NUMBER, CHOICE):
        assert score(spec, text, text) in (True, None)


@given(st.text(st.sampled_from("ab{}\\")))
def test_boxed_is_balanced(text: str) -> None:
    """The content of a box is the text between its own braces."""
    inside = text.replace("{", "").replace("}", "")
    assert find_boxed(rf"x \boxed{{{inside}}} y") == inside
    assert find_boxed(rf"x \boxed{{a{{{inside}}}}} y") == f"a{{{inside}}}"
    assert find_boxed(text) is None
