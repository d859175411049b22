"""From a row to the conversation that the model is asked, or to the reason why it cannot be.

A row never raises: whatever is wrong with its values comes back as a :class:`RowError`, whose text
holds no text of the row. What is wrong with the job's template itself is a :class:`TemplateError`,
found by :func:`template_columns` before anything runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchrun.data.schema import InputColumns
from batchrun.formats import ResponseFormat
from batchrun.job import Generation, Job
from batchrun.records import ErrorKind, Message, Row, RowError, ToolCall
from batchrun.tools import Tool, as_call

MAX_PROMPT_BYTES = 1024 * 1024
MAX_TEMPLATE_BYTES = 64 * 1024
MAX_LOOP_STEPS = 100_000
ROLES = ("system", "user", "assistant", "tool")

# Can make a gigabyte out of a number: no use for them in a prompt.
_REFUSED_FILTERS = ("center", "format", "pprint", "attr")
_REFUSED_METHODS = frozenset(
    {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}
)


class TemplateError(ValueError):
    """The job's template cannot be used; the text says why and, where known, the line in it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a row asks: the conversation, whether to think first, what it may call, how to sample.

    ``params`` are keyword arguments of :class:`batchrun.engine.params.SamplingParams`, with the
    row's overrides in place; their ``seed`` is the job's (or the row's own), not yet the row's.
    """

    messages: tuple[Message, ...]
    reasoning: bool
    params: Mapping[str, object]
    n: int
    tools: tuple[Tool, ...] = ()


def input_columns(job: Job) -> InputColumns:
    """The columns that ``job`` reads. Raises TemplateError for a template that is none."""
    rows = job.input
    return InputColumns(
        id=rows.id_column,
        prompt=rows.prompt_column,
        messages=rows.messages_column,
        template=template_columns(rows.template) if rows.template is not None else (),
        overrides=rows.overrides,
        carried=rows.columns,
        answer=job.evaluate.answer_column if job.evaluate is not None else None,
    )


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that ``template`` reads, in alphabetical order.

    Raises:
        TemplateError: It is not valid Jinja, too large, or uses what the sandbox has not.
    """
    environment, syntax = _parse(template)
    del environment
    return tuple(sorted(meta.find_undeclared_variables(syntax)))


class PromptBuilder:
    """Builds the prompts of one job. Raises TemplateError when the job's template is none."""

    def __init__(self, job: Job) -> None:
        self._input = job.input
        self._generation = job.generation
        written = job.generation.response_format
        # Read once for all rows: a schema can be large, and no row has one of its own.
        self._bound_to = None if written is None else ResponseFormat.parse(written)
        self._template: jinja2.Template | None = None
        self._names: tuple[str, ...] = ()
        self._environment: _Sandbox | None = None
        if job.input.template is not None:
            self._environment, syntax = _parse(job.input.template)
            self._names = template_columns(job.input.template)
            code = self._environment.compile(syntax)
            self._template = jinja2.Template.from_code(self._environment, code, {})

    def build(self, row: Row) -> Prompt | RowError:
        """The prompt of ``row``, or why it has none."""
        if row.error is not None:
            return row.error
        try:
            generation = self._generation_of(row)
            messages = self._messages_of(row)
            _check_size(messages)
        except _BadRowError as error:
            return error.row_error
        params = generation.model_dump(exclude={"reasoning", "response_format", "tools"})
        params["response_format"] = self._bound_to
        if params["answer_reserve"] == "auto":
            params["answer_reserve"] = None
        return Prompt(messages, generation.reasoning, params, generation.n, generation.tools)

    def _generation_of(self, row: Row) -> Generation:
        values: dict[str, object] = {}
        for name in self._input.overrides:
            value = _plain(row.values.get(name))
            if name == "tools" and isinstance(value, str):
                value = _decoded(value, name)
            if value is not None:
                values[name] = value
        if not values:
            return self._generation
        try:
            return self._generation.with_overrides(values)
        except ValueError as error:
            raise _invalid(f"override column: {error}") from None

    def _messages_of(self, row: Row) -> tuple[Message, ...]:
        rows = self._input
        if rows.messages_column is not None:
            messages = _conversation(row.values.get(rows.messages_column), rows.messages_column)
        elif rows.prompt_column is not None:
            messages = (_user(row.values.get(rows.prompt_column), f"column {rows.prompt_column}"),)
        else:
            messages = (_user(self._render(row), "the rendered template"),)
        if rows.system is not None and messages[0].role != "system":
            messages = (Message("system", rows.system), *messages)
        return messages

    def _render(self, row: Row) -> str:
        assert self._template is not None and self._environment is not None
        self._environment.steps_left = MAX_LOOP_STEPS
        values = {name: row.values[name] for name in self._names if name in row.values}
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                if size > MAX_PROMPT_BYTES:
                    raise _too_long("the rendered template")
                pieces.append(piece)
        except jinja2.UndefinedError as error:
            raise _template(f"{error.message}") from None
        except (SecurityError, jinja2.TemplateRuntimeError) as error:
            raise _template(f"not allowed in a template: {error}") from None
        except RecursionError:
            raise _template("nested too deeply") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # The text of such an error can hold the row's; its type is enough to find it.
            raise _template(f"{type(error).__name__} while rendering") from None
        return "".join(pieces)


class _BadRowError(Exception):
    def __init__(self, row_error: RowError) -> None:
        super().__init__(row_error)
        self.row_error = row_error


def _invalid(message: str) -> _BadRowError:
    return _BadRowError(RowError(ErrorKind.INVALID_PROMPT, message))


def _template(message: str) -> _BadRowError:
    return _BadRowError(RowError(ErrorKind.TEMPLATE, message[:240]))


def _too_long(what: str) -> _BadRowError:
    return _BadRowError(RowError(ErrorKind.TOO_LONG, f"{what} is larger than 1 MiB"))


def _plain(value: object) -> object:
    """An override as the job file would have it.

    Data frames keep integers with gaps as floats, and say NaN for a gap.
    """
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if value.is_integer():
            return int(value)
    return value


def _user(value: object, what: str) -> Message:
    if value is None:
        raise _invalid(f"{what} is null")
    if not isinstance(value, str):
        raise _invalid(f"{what} is not text")
    if not value.strip():
        raise _invalid(f"{what} is empty" if not value else f"{what} is nothing but white space")
    return Message("user", value)


def _conversation(value: object, column: str) -> tuple[Message, ...]:
    if value is None:
        raise _invalid(f"column {column} is null")
    if isinstance(value, str):
        value = _decoded(value, column)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _invalid(f"column {column} is not a list of messages")
    if not value:
        raise _invalid(f"column {column} has no message")
    messages = tuple(_message(item, index, column) for index, item in enumerate(value))
    # A tool may well have answered nothing; nobody else may.
    last = messages[-1]
    if not (last.content.strip() or last.tool_calls or last.role == "tool"):
        raise _invalid(f"column {column}: the last message is empty")
    if all(message.role == "system" for message in messages):
        raise _invalid(f"column {column} has only a system message")
    return messages


def _decoded(text: str, column: str) -> object:
    if len(text) > MAX_PROMPT_BYTES:
        raise _too_long(f"column {column}")
    if not text.strip():
        raise _invalid(f"column {column} is empty")
    try:
        return json.loads(text)
    except RecursionError:
        raise _invalid(f"column {column}: JSON nested too deeply") from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise _invalid(f"column {column} is not valid JSON{where}") from None


def _message(item: object, index: int, column: str) -> Message:
    where = f"column {column}, message {index}"
    if not isinstance(item, Mapping):
        raise _invalid(f"{where} is null" if item is None else f"{where} has no role and content")
    role, content = item.get("role"), item.get("content")
    if role is None:
        raise _invalid(f"{where}: role is null or missing")
    if role not in ROLES:
        raise _invalid(f"{where}: unknown role; known are {', '.join(ROLES)}")
    if role == "system" and index > 0:
        raise _invalid(f"{where}: only the first message can be a system message")
    calls = _calls(item.get("tool_calls"), where)
    if calls and role != "assistant":
        raise _invalid(f"{where}: only an assistant message can have tool calls")
    if content is None and calls:
        content = ""
    if content is None:
        raise _invalid(f"{where}: content is null or missing")
    if not isinstance(content, str):
        raise _invalid(f"{where}: content is not text")
    return Message(str(role), content, calls)


def _calls(value: object, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _invalid(f"{where}: tool_calls is not a list")
    try:
        return tuple(as_call(item) for item in value)
    except ValueError as error:
        raise _invalid(f"{where}, tool_calls: {error}") from None


def _check_size(messages: Sequence[Message]) -> None:
    size = 0
    calls = [
        text for m in messages for call in m.tool_calls for text in (call.name, call.arguments)
    ]
    for text in [*(message.content for message in messages), *calls]:
        # Characters first: they are counted for free, and are never more than the bytes.
        if size + len(text) > MAX_PROMPT_BYTES:
            raise _too_long("the prompt")
        try:
            size += len(text.encode())
        except UnicodeEncodeError:
            raise _invalid("the prompt has a lone surrogate, which is not text") from None
    if size > MAX_PROMPT_BYTES:
        raise _too_long("the prompt")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Templates see the row's columns and nothing else, and stay small in memory and time."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            finalize=_refuse_null,
            loader=None,
        )
        # Every free name is a column of the row: not even `range` is there besides.
        self.globals.clear()
        for name in _REFUSED_FILTERS:
            self.filters.pop(name, None)
        self.filters["_counted"] = self._counted
        self.steps_left = MAX_LOOP_STEPS

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        """Whether a template may read ``attr`` of ``obj``."""
        if isinstance(obj, str) and attr in _REFUSED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: object, right: object
    ) -> object:
        """Arithmetic of numbers of a sane size; nothing that repeats or formats text."""
        if not isinstance(left, int | float) or not isinstance(right, int | float):
            raise SecurityError(f"`{operator}` is for numbers only")
        if (operator == "**" and abs(right) > 64) or max(abs(left), abs(right)) > 2**63:
            raise SecurityError(f"`{operator}` is for small numbers only")
        result: object = super().call_binop(context, operator, left, right)
        return result

    def _counted(self, items: object) -> Iterator[object]:
        for item in items:  # type: ignore[attr-defined]
            self.steps_left -= 1
            if self.steps_left < 0:
                raise SecurityError(f"more than {MAX_LOOP_STEPS} steps of loops")
            yield item


def _refuse_null(value: object) -> object:
    if value is None:
        raise SecurityError("a null would be printed; write for example {{ x or '' }}")
    return value


def _parse(template: str) -> tuple[_Sandbox, nodes.Template]:
    if len(template.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
        raise TemplateError("the template is larger than 64 KiB")
    environment = _Sandbox()
    try:
        syntax = environment.parse(template)
        for loop in syntax.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            for node in syntax.find_all(kind):
                raise TemplateError(
                    f"line {node.lineno}: a template stands alone: no {_name(node)}"
                )
        # Compiling finds what parsing does not, such as filters that are not there.
        environment.compile(syntax)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"line {error.lineno}: {error.message}") from None
    except RecursionError:
        raise TemplateError("the template is nested too deeply") from None
    return environment, syntax


def _name(node: nodes.Node) -> str:
    return (
        "import"
        if isinstance(node, nodes.Import | nodes.FromImport)
        else type(node).__name__.lower()
    )
