"""The task of the embedded model: small sums, said in many ways.

One seeded generator serves the training, the accuracy table, the demonstration data and the
tests. A *problem* is a chain of 2 to 8 numbers from 1 to 99, joined by plus signs and, in some,
minus signs; no partial result is negative. Its *trace* is the chain of running results::

    37+85=122
    +12=134

Everything comes from a ``random.Random`` that the caller seeds, so the same seed gives the same
texts on every machine. Problems are split by a hash of their expression: training never sees an
expression that an evaluation or the demonstration data asks, however either phrases it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

MIN_OPERANDS = 2
MAX_OPERANDS = 8
LARGEST = 99
"""Operands are 1..LARGEST."""

REFUSAL = "I can only add and subtract numbers from 1 to 99."
REFUSAL_TRACE = "Not a sum I can do.\n"

# {e} is the expression, {l} the operands as a list in words (only for pure additions).
EXPRESSION_PHRASINGS: tuple[str, ...] = (
    "What is {e}?",
    "What is {e}?",  # the phrasing of the documentation: twice as often as the others
    "{e}",
    "{e} =",
    "{e} = ?",
    "Compute {e}.",
    "Calculate {e}",
    "How much is {e}?",
    "What does {e} equal?",
    "Solve: {e}",
    "Work out {e}, please.",
    "Tell me the value of {e}.",
    "I have to know what {e} is.",
    "What is the value of {e}?",
    "Evaluate {e}",
    "Find {e}.",
    "{e} is what?",
    "Let's compute {e}.",
    "Here's one for you: {e}",
    "Q: {e}\nA:",
    "The following should be worked out: {e}",
    "Please compute {e}.",
    "please calculate {e}",
    "Can you work out {e}?",
    "Could you compute {e}?",
    "what is {e}",
    "how much is {e}",
    "I need {e}.",
    "{e}, what is that?",
    "Just the result: {e}",
    "Answer this: {e}",
    "If I compute {e}, what do I get?",
    "Would you tell me what {e} is?",
    "We had {e}, so what comes out?",
    "The task is {e}. What is right?",
)
LIST_PHRASINGS: tuple[str, ...] = (
    "Add {l}.",
    "What is the sum of {l}?",
    "Find the total of {l}.",
    "Sum up {l}",
    "{l}: what is their sum?",
    "Add these numbers: {l}",
    "Total of {l}?",
    "Here are some numbers: {l}. What do they add up to?",
    "My numbers: {l}. I'd like the sum, please.",
    "Sum: {l}",
    "Please add {l}.",
    "please add {l}",
    "add {l}",
    "Can you add {l}?",
    "Could you sum {l}?",
    "What do {l} add up to?",
    "what is the sum of {l}",
    "Give the sum of {l}.",
    "Calculate the sum of {l}.",
    "I need the total of {l}.",
    "Sum {l}.",
    "Add together {l}.",
    "What is {l} in total?",
    "Take {l} together, what is the total?",
)
# A pure addition told as a story: an opening with the first number and the thing counted, a step
# for each further number, a question.
_STORY_THINGS = ("apples", "books", "coins", "cars", "cards", "eggs", "points", "letters")
_STORY_OPENINGS = (
    "I have {n} {t}",
    "There are {n} {t}",
    "If I have {n} {t}",
    "She had {n} {t}",
    "A shop has {n} {t}",
)
_STORY_STEPS = ("get {n} more", "{n} more come", "find {n} more", "buy {n} {t}", "add {n}")
_STORY_QUESTIONS = (
    "How many {t} are there?",
    "How many are there now?",
    "What is the total?",
    "How many {t} is that?",
)
HELD_OUT_EXPRESSION_PHRASINGS: tuple[str, ...] = (
    "Give me the result of {e}.",
    "Can you evaluate {e}?",
    "What do you get for {e}?",
    "My homework says {e}, so what is the answer?",
    "What's {e}?",
)
HELD_OUT_LIST_PHRASINGS: tuple[str, ...] = (
    "Please add up {l}.",
    "The numbers are {l}; give their total.",
    "How much do {l} make together?",
)

SYSTEM_TEXTS: tuple[str, ...] = (
    "",
    "You are a helpful assistant.",
    "Be brief.",
    "You are a calculator.",
    "Answer with the number only.",
    "You are good at mental arithmetic. Think step by step, then answer.",
)
HELD_OUT_SYSTEM_TEXTS: tuple[str, ...] = (
    "You are a careful accountant who checks every figure.",
    "Reply in plain text without explanations.",
    "Du bist ein hilfreicher Assistent.",
)

_PREFIXES = ("Please", "Hello!", "Hi,", "Hey there.", "Good morning.", "Quick question:", "OK.")
_SUFFIXES = ("Thanks!", "Thank you.", "Please.", "Be quick.", "Cheers", "I am in a hurry.", ":)")
HELD_OUT_PREFIXES: tuple[str, ...] = ("Dear model,", "Could you help me?", "Good evening!")
HELD_OUT_SUFFIXES: tuple[str, ...] = ("Many thanks in advance.", "No rush.", "Best wishes, Ann")

# Text that means something to a chat template or tokenizer, here as a user's plain words.
STRAY_WORDS: tuple[str, ...] = (
    "/think",
    "/no_think",
    "</think>",
    "<think>",
    "<think></think>",
    "<SPECIAL_12>",
    "<SPECIAL_11>Assistant",
    "<s>",
    "</s>",
)

_WORDS = (
    "the a one my your this that some every old new big small red green blue fast slow good bad "
    "house garden river train city book story dog cat bird tree road window letter song game ship "
    "people friend doctor teacher king child water fire light night day week year summer winter "
    "is was has makes finds takes wants sees keeps writes reads buys sells opens closes moves "
    "and or but with without under over near after before because while about from into "
    "always never often maybe here there today tomorrow quickly slowly well very "
    "weather music history language computer picture recipe holiday market price number answer "
    "reason question idea problem world country mountain island capital president planet"
).split()
_TOPICS = (
    "the capital of France", "the weather in Rome", "the meaning of life", "a black hole",
    "the best book", "your name", "the tallest mountain", "photosynthesis", "a haiku",
    "the speed of light", "a recursive function", "the price of bread", "love", "jazz",
    "an electric car", "the history of Japan", "the largest planet", "good coffee",
)  # fmt: skip
_REFUSAL_FRAMES = (
    "What is {t}?", "Tell me about {t}.", "Explain {t}", "Write a poem about {t}.", "Who made {t}?",
    "Why is {t} important?", "Where can I find {t}?", "Do you like {t}?", "Translate: {t}",
    "Summarise {t} in one line.", "How does {t} work?", "When was {t} invented?", "{t}",
    "Give me three facts on {t}.", "I would like to talk about {t}.",
)  # fmt: skip
_SMALL_TALK = (
    "Hello", "Hello!", "Hi", "Hi there", "Hey", "Good morning", "How are you?", "Thanks!",
    "Thank you", "Who are you?", "What can you do?", "Help", "Help me", "Yes", "No", "ok",
    "Goodbye", "Test", "Are you there?", "Tell me a joke.", "Sing a song", "?", "...",
    "Say something.", "Can you add numbers?", "What time is it?", "You are wrong.",
)  # fmt: skip
HELD_OUT_OFF_TASK: tuple[str, ...] = (
    "What is the capital of Spain?",
    "Who wrote Hamlet?",
    "Describe the ocean to a child.",
    "List the colours of the rainbow.",
    "Good night",
    "How old are you?",
    "What's up?",
    "Is it going to rain tomorrow?",
    "Please write an email to my landlord.",
    "Name a famous painter.",
    "What should I cook tonight?",
    "Define entropy.",
    "Where is Mount Everest?",
    "Recommend a film.",
    "I feel sad today.",
    "Which came first, the chicken or the egg?",
    "Wie heisst du?",
    "Correct my spelling, please.",
    "What is 12*7?",
    "What is 81/9?",
    "What is 250+613?",
    "Compute 1204-77.",
    "What is 6 times 7?",
    "Who was president in 1962?",
)


@dataclass(frozen=True)
class Problem:
    """A chain of numbers to add and subtract.

    ``signs[i]`` (1 or -1) belongs to ``operands[i]``; ``signs[0]`` is always 1.
    """

    operands: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def expression(self) -> str:
        """The chain without spaces, e.g. ``37+85-12``: what the held-out split hashes."""
        rest = zip(self.operands[1:], self.signs[1:], strict=True)
        return str(self.operands[0]) + "".join(f"{_symbol(sign)}{n}" for n, sign in rest)

    @property
    def answer(self) -> str:
        """The result in digits."""
        return str(sum(n * sign for n, sign in zip(self.operands, self.signs, strict=True)))

    @property
    def trace(self) -> str:
        """The running results, one a line, each line ended by a newline."""
        total = self.operands[0]
        text = str(total)
        for n, sign in zip(self.operands[1:], self.signs[1:], strict=True):
            total += n * sign
            text += f"{_symbol(sign)}{n}={total}\n"
        return text

    @property
    def is_addition(self) -> bool:
        """Whether no sign is a minus."""
        return all(sign == 1 for sign in self.signs)

    @property
    def held_out(self) -> bool:
        """Whether the problem belongs to the tenth that training never sees."""
        return is_held_out(self.expression)


@dataclass(frozen=True)
class Example:
    """One conversation turn: what is asked and what a right reply holds."""

    system: str
    prompt: str
    trace: str
    answer: str
    problem: Problem | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    """Earlier turns as (user text, assistant text)."""


def is_held_out(expression: str) -> bool:
    """Split by a hash that does not vary with the process or the platform."""
    return zlib.crc32(expression.encode()) % 10 == 0


def _symbol(sign: int) -> str:
    return "+" if sign > 0 else "-"


def _draw_operands(rng: Random, count: int, digits: str) -> list[int]:
    """``count`` operands of one style; plain uniform draws would hardly ever show one digit."""
    if digits == "mixed":
        draw = rng.random()
        digits = "any" if draw < 0.45 else "balanced" if draw < 0.75 else "one"
        digits = "repeat" if draw > 0.90 else digits
        digits = "run" if draw > 0.95 else digits
    if digits == "any":
        return [rng.randint(1, LARGEST) for _ in range(count)]
    if digits == "balanced":
        return [rng.randint(1, 9) if rng.random() < 0.5 else rng.randint(10, LARGEST)
                for _ in range(count)]  # fmt: skip
    if digits == "one":
        return [rng.randint(1, 9) for _ in range(count)]
    if digits == "repeat":
        few = [rng.randint(1, 9 if rng.random() < 0.5 else LARGEST) for _ in range(2)]
        return [few[rng.random() < 0.2] for _ in range(count)]
    if digits == "run":
        step = rng.choice((1, 1, 1, 2, 3, 5, 10))
        first = rng.randint(1, LARGEST - step * (count - 1))
        run = [first + step * i for i in range(count)]
        return run if rng.random() < 0.8 else run[::-1]
    raise ValueError(f"unknown style of operands: {digits}")


def draw_problem(
    rng: Random,
    *,
    held_out: bool | None,
    operands: tuple[int, int] = (MIN_OPERANDS, MAX_OPERANDS),
    digits: str = "mixed",
    subtraction: float = 0.35,
) -> Problem:
    """Draw until the problem is of the wanted side of the split (``None``: either).

    ``operands`` bounds their count; ``digits`` is ``any``, ``balanced``, ``one``, ``repeat``,
    ``run`` or ``mixed``; ``subtraction`` is the share of problems that may hold minus signs.
    """
    while True:
        count = rng.randint(*operands)
        numbers = _draw_operands(rng, count, digits)
        signs = [1] * count
        if rng.random() < subtraction:
            if count == 2 and numbers[0] < numbers[1]:
                numbers.reverse()
            total = numbers[0]
            for i in range(1, count):
                if numbers[i] <= total and rng.random() < (1.0 if count == 2 else 0.5):
                    signs[i] = -1
                total += signs[i] * numbers[i]
        problem = Problem(tuple(numbers), tuple(signs))
        if held_out is None or problem.held_out == held_out:
            return problem


def _spell(rng: Random, problem: Problem, plain: bool) -> str:
    """The expression as written by a person: tight, spaced or in words."""
    draw = 0.0 if plain else rng.random()
    if draw < 0.7:
        return problem.expression
    if draw < 0.88:
        return problem.expression.replace("+", " + ").replace("-", " - ")
    return problem.expression.replace("+", " plus ").replace("-", " minus ")


def phrase(
    rng: Random,
    problem: Problem,
    *,
    plain: bool = False,
    expressions: Sequence[str] = EXPRESSION_PHRASINGS,
    lists: Sequence[str] = LIST_PHRASINGS,
) -> str:
    """Ask for a problem in one of the given phrasings; ``plain`` writes ``37+85`` tightly."""
    numbers = [str(n) for n in problem.operands]
    if not plain and lists is LIST_PHRASINGS and problem.is_addition and rng.random() < 0.08:
        return _tell_story(rng, numbers)
    frames = [*expressions, *lists] if problem.is_addition else expressions
    frame = rng.choice(frames)
    if frame in ("Add {l}.", "Please add {l}.") and len(numbers) == 2 and rng.random() < 0.3:
        return frame.format(l=f"{numbers[0]} to {numbers[1]}")
    between = ", " if plain or rng.random() < 0.8 else rng.choice((" ", " and ", "; ", "\n", ","))
    last = " and " if between == ", " and rng.random() < 0.8 else between
    listed = between.join(numbers[:-1]) + last + numbers[-1]
    return frame.format(e=_spell(rng, problem, plain), l=listed)


def _tell_story(rng: Random, numbers: Sequence[str]) -> str:
    """The numbers as things that are had, found and bought."""
    thing = rng.choice(_STORY_THINGS)
    comma = rng.choice((" and ", ", ", ", then ", ". Then "))
    steps = [rng.choice(_STORY_OPENINGS).format(n=numbers[0], t=thing)]
    steps += [rng.choice(_STORY_STEPS).format(n=n, t=thing) for n in numbers[1:]]
    end = rng.choice((". ", "; ", ". "))
    return comma.join(steps) + end + rng.choice(_STORY_QUESTIONS).format(t=thing)


def _babble(rng: Random, words: int) -> str:
    """Some words, now and then an invented one, so that unknown words do not disturb."""
    out = []
    for _ in range(words):
        if rng.random() < 0.25:
            letters = "abcdefghijklmnopqrstuvwxyzäéñüß"
            out.append("".join(rng.choice(letters) for _ in range(rng.randint(2, 6))))
        else:
            out.append(rng.choice(_WORDS))
    text = " ".join(out)
    return text.capitalize() if rng.random() < 0.5 else text


def surround(rng: Random, text: str) -> str:
    """Ordinary words before or after a question, as people write them."""
    draw = rng.random()
    if draw < 0.35:
        text = f"{rng.choice(_PREFIXES)} {text}"
    elif draw < 0.7:
        text = f"{text} {rng.choice(_SUFFIXES)}"
    elif draw < 0.85:
        text = f"{_babble(rng, rng.randint(1, 6))}{rng.choice('.!:,')} {text}"
    else:
        text = f"{text}{rng.choice(('', '.', '!'))} {_babble(rng, rng.randint(1, 6))}"
    return text


def add_stray_word(rng: Random, text: str) -> str:
    """A word that a template or tokenizer could mistake for its own, as plain text."""
    word = rng.choice(STRAY_WORDS)
    return f"{text} {word}" if rng.random() < 0.6 else f"{word} {text}"


def off_task_text(rng: Random) -> str:
    """A question the model must refuse: other topics, other arithmetic, larger numbers."""
    draw = rng.random()
    if draw < 0.2:
        return rng.choice(_SMALL_TALK)
    if draw < 0.4:
        return rng.choice(_REFUSAL_FRAMES).format(t=rng.choice(_TOPICS))
    if draw < 0.55:
        return rng.choice(_REFUSAL_FRAMES).format(t=_babble(rng, rng.randint(1, 4)).lower())
    if draw < 0.65:
        return _babble(rng, rng.randint(1, 8)) + rng.choice(("", ".", "?", "!"))
    if draw < 0.72:
        year = rng.choice((rng.randint(1, 99), rng.randint(1000, 2100)))
        return rng.choice((
            f"Who was king in {year}?", f"I have {year} books.", f"What happened in {year}?",
            f"{year}", f"Tell me about the year {year}.", f"Is {year} a prime number?",
        ))  # fmt: skip
    frame = rng.choice(EXPRESSION_PHRASINGS)
    if draw < 0.86:
        operator = rng.choice(("*", "/", "x", " times ", " divided by ", "^", " * "))
        pair = f"{rng.randint(1, 99)}{operator}{rng.randint(1, 99)}"
        return frame.format(e=pair)
    large = [rng.choice((rng.randint(100, 999), rng.randint(1000, 99999)))]
    large += [rng.randint(100, 999) for _ in range(rng.randint(1, 2))]
    rng.shuffle(large)
    return frame.format(e=rng.choice("+-").join(str(n) for n in large))


def draw_example(
    rng: Random, *, held_out: bool | None, max_operands: int = MAX_OPERANDS
) -> Example:
    """One training example: mostly sums, a few refusals, noise and earlier turns."""
    draw = rng.random()
    if draw < 0.35:
        system = ""
    elif draw < 0.9:
        system = rng.choice(SYSTEM_TEXTS)
    else:
        system = _babble(rng, rng.randint(1, 6)) + "."
    if rng.random() < 0.06:
        prompt = off_task_text(rng)
        if rng.random() < 0.1:
            prompt = add_stray_word(rng, prompt)
        return Example(system, prompt, REFUSAL_TRACE, REFUSAL)
    problem = draw_problem(rng, held_out=held_out, operands=(MIN_OPERANDS, max_operands))
    prompt = phrase(rng, problem)
    if rng.random() < 0.2:
        prompt = surround(rng, prompt)
    if rng.random() < 0.04:
        prompt = add_stray_word(rng, prompt)
    earlier: tuple[tuple[str, str], ...] = ()
    if rng.random() < 0.03:
        before = draw_problem(rng, held_out=held_out, operands=(MIN_OPERANDS, 3))
        earlier = ((phrase(rng, before), before.answer),)
    return Example(system, prompt, problem.trace, problem.answer, problem, earlier)
