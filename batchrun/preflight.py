"""What can be known before a run starts: is everything there that the job names, and usable?

Reads listings, Parquet footers and the small files of the checkpoint; loads no weights and leaves
nothing behind. Finds every problem rather than the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from batchrun.data.checkpoints import find_checkpoint
from batchrun.data.footers import InputFile
from batchrun.data.inputs import find_input
from batchrun.data.schema import InputColumns, InputSchema
from batchrun.data.store import Store
from batchrun.data.types import answer_kind
from batchrun.engine.chat import ChatTemplate, PromptError
from batchrun.engine.tokenizer import Tokenizer, load_stop_ids
from batchrun.errors import (
    BatchrunError,
    CheckpointError,
    InputError,
    OutputError,
    Problem,
    StorageError,
)
from batchrun.evaluate import INSTALL_MATH, ScoreSpec, missing_library
from batchrun.formats import ResponseFormat, slips
from batchrun.job import Job
from batchrun.jobfile import JobSource, KeyPath
from batchrun.jobrules import OUTPUT_SCHEMES
from batchrun.model.checkpoint import check_checkpoint, expected_tensors
from batchrun.model.config import ModelConfig, load_config
from batchrun.prompts import TemplateError, input_columns, template_columns
from batchrun.records import Message
from batchrun.wording import dotted

Finder = Callable[
    [str | Sequence[str], Mapping[str, object]], tuple[list[InputFile], list[BatchrunError]]
]
"""Finds the files of an input: those that can be used, and what is wrong with the others."""

_T = TypeVar("_T")
_MAX_FILE_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checked job will work on, for people to look over before they start it."""

    num_files: int = 0
    num_rows: int = 0
    size_bytes: int = 0
    num_layers: int = 0
    num_parameters: int = 0
    max_model_len: int = 0


@dataclass(frozen=True, slots=True)
class ReadCheckpoint:
    """What of a checkpoint has been read without its weights."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatTemplate


@dataclass(frozen=True, slots=True)
class Inspection:
    """Every problem of a job's surroundings, and what is known of them: ``files`` are those of the
    input that can be read, ``checkpoint`` is None where there is no usable one."""

    problems: tuple[Problem, ...]
    facts: Facts
    files: tuple[InputFile, ...] = ()
    checkpoint: ReadCheckpoint | None = None


def check_job(job: Job, source: JobSource | None = None) -> list[Problem]:
    """Every problem of what ``job`` names: input, columns, template, checkpoint, output.

    ``source`` gives the problems their lines. Raises StorageError when storage cannot be reached
    and nothing else is wrong.
    """
    return list(inspect_job(job, source).problems)


def inspect_job(
    job: Job,
    source: JobSource | None = None,
    bad: frozenset[KeyPath] = frozenset(),
    *,
    find: Finder = find_input,
    weights: bool = True,
) -> Inspection:
    """Check what ``job`` names. Keys that are ``bad`` hold stand-ins: what needs them is skipped.

    ``find`` finds the input's files. Without ``weights`` a local checkpoint's may be missing.

    Raises:
        StorageError: Storage cannot be reached, and nothing else is wrong.
    """
    inspector = _Inspector(job, source or JobSource.of_mapping({}, job.name), bad, find, weights)
    inspector.check_input()
    inspector.check_checkpoint()
    inspector.check_output()
    if inspector.unreachable is not None and len(inspector.problems) == inspector.num_unreachable:
        raise inspector.unreachable
    problems = tuple(dict.fromkeys(inspector.problems))
    return Inspection(problems, inspector.facts, inspector.files, inspector.checkpoint)


class _Inspector:
    def __init__(
        self,
        job: Job,
        source: JobSource,
        bad: frozenset[KeyPath],
        find: Finder,
        weights: bool,
    ) -> None:
        self.job = job
        self.source = source
        self.bad = bad
        self.find = find
        self.weights = weights
        self.problems: list[Problem] = []
        self.facts = Facts()
        self.files: tuple[InputFile, ...] = ()
        self.checkpoint: ReadCheckpoint | None = None
        self.unreachable: StorageError | None = None
        self.num_unreachable = 0

    def check_input(self) -> None:
        """Files, columns and the template, and what scoring needs."""
        self._check_scorer()
        template = self.job.input.template
        if template is not None:
            try:
                template_columns(template)
            except TemplateError as error:
                hint = "see the Jinja documentation; names are columns of the row"
                self._add(("input", "template"), str(error), hint)
        if not self._usable("input.path", "input.storage_options"):
            return
        path = self.job.input.path
        paths = path if isinstance(path, str) else list(path)
        found = self._try(
            ("input", "path"), lambda: self.find(paths, self.job.input.storage_options)
        )
        if found is None:
            return
        files, problems = found
        self.files = tuple(files)
        for problem in problems[:_MAX_FILE_PROBLEMS]:
            self._add_error(("input", "path"), problem)
        if len(problems) > _MAX_FILE_PROBLEMS:
            rest = len(problems) - _MAX_FILE_PROBLEMS
            self._add(("input", "path"), f"{rest} more files cannot be used", "mend them too")
        self.facts = replace(
            self.facts,
            num_files=len(files),
            num_rows=sum(file.num_rows for file in files),
            size_bytes=sum(file.size_bytes for file in files),
        )
        if files:
            self._check_columns(files)

    def _check_columns(self, files: list[InputFile]) -> None:
        for key, columns in self._columns_by_key():
            schema, errors = InputSchema.check(files, columns)
            for error in errors:
                self._add_error(key, error)
            if columns.answer is not None and not errors:
                self._check_answers(schema)
        if not self.problems:
            # Each key's columns are fine alone; they must be so together too.
            for error in InputSchema.check(files, input_columns(self.job))[1]:
                self._add_error(("input",), error)

    def _check_answers(self, schema: InputSchema) -> None:
        evaluate = self.job.evaluate
        assert evaluate is not None
        kind = schema.schema.field(evaluate.answer_column).type
        if evaluate.scorer in ("number", "math") and answer_kind(kind) == "switch":
            self._add(
                ("evaluate", "answer_column"),
                f"column {evaluate.answer_column!r} is {kind}, which the scorer "
                f"{evaluate.scorer} cannot compare",
                "write scorer: exact or choice, or name a column of numbers or texts",
            )

    def _check_scorer(self) -> None:
        """The library that the scorer needs."""
        evaluate = self.job.evaluate
        if evaluate is not None and (missing := missing_library(ScoreSpec(evaluate.scorer))):
            self._add(("evaluate", "scorer"), f"is {evaluate.scorer}, but {missing}", INSTALL_MATH)

    def _columns_by_key(self) -> Iterator[tuple[KeyPath, InputColumns]]:
        rows = self.job.input
        if rows.id_column is not None:
            yield ("input", "id_column"), InputColumns(id=rows.id_column)
        if rows.prompt_column is not None:
            yield ("input", "prompt_column"), InputColumns(prompt=rows.prompt_column)
        if rows.messages_column is not None:
            yield ("input", "messages_column"), InputColumns(messages=rows.messages_column)
        if rows.template is not None:
            try:
                names = template_columns(rows.template)
            except TemplateError:
                names = ()
            yield ("input", "template"), InputColumns(template=names)
        for index, name in enumerate(rows.overrides):
            yield ("input", "overrides", index), InputColumns(overrides=(name,))
        for index, carried in enumerate(rows.columns):
            yield ("input", "columns", index), InputColumns(carried=(carried,))
        if self.job.evaluate is not None:
            answer = self.job.evaluate.answer_column
            yield ("evaluate", "answer_column"), InputColumns(answer=answer)

    def check_checkpoint(self) -> None:
        """Config, headers of the weights, tokenizer, chat template, lengths."""
        if not self._usable("model.path"):
            return
        key = ("model", "path")
        folder = self._try(key, self._checkpoint_folder)
        if folder is None:
            return
        config = self._try(key, lambda: self._config(folder))
        if config is not None:
            self._check_lengths(config)
        tokenizer = self._try(key, lambda: Tokenizer.load(folder))
        self._try(key, lambda: load_stop_ids(folder))
        if tokenizer is not None:
            self._check_response_format(tokenizer, config)
            chat = self._try(key, lambda: ChatTemplate.load(folder, tokenizer))
            if chat is not None:
                self._check_chat(chat)
            if chat is not None and config is not None:
                self.checkpoint = ReadCheckpoint(folder, config, tokenizer, chat)

    def _checkpoint_folder(self) -> Path:
        # A remote checkpoint's weights are downloaded by the workers, where they are needed.
        model = self.job.model
        return find_checkpoint(model.path, self.job.model_storage_options, weights=False)

    def _config(self, folder: Path) -> ModelConfig:
        is_remote = "://" in self.job.model.path and not self.job.model.path.startswith("file://")
        can_lack_weights = is_remote or not self.weights
        if can_lack_weights and not any(folder.glob("*.safetensors")):
            return load_config(folder)
        return check_checkpoint(folder).config

    def _check_lengths(self, config: ModelConfig) -> None:
        longest = config.max_position_embeddings
        shapes = expected_tensors(config).values()
        self.facts = replace(
            self.facts,
            num_layers=len(config.layers),
            num_parameters=sum(math.prod(shape) for shape in shapes),
            max_model_len=min(self.job.model.max_model_len or longest, longest),
        )
        wanted = self.job.model.max_model_len
        if wanted is not None and wanted > longest:
            message = f"is {wanted}, more than the checkpoint's {longest}"
            self._add(("model", "max_model_len"), message, f"write at most {longest}, or null")
        elif wanted is None and self.job.generation.max_tokens >= longest:
            self._add(
                ("generation", "max_tokens"),
                f"is {self.job.generation.max_tokens}, which leaves no room for a prompt in the "
                f"checkpoint's {longest} tokens",
                "lower it",
            )

    def _check_response_format(self, tokenizer: Tokenizer, config: ModelConfig | None) -> None:
        """Compile it as the engine will, with the checkpoint's tokens."""
        generation = self.job.generation
        if generation.response_format is None or any(slips(generation.response_format)):
            return  # what is wrong with it has been said with the rules of the job file
        from batchrun.engine.constraints import Constraints  # loads torch, which takes seconds

        bound_to = ResponseFormat.parse(generation.response_format)
        vocab_size = tokenizer.vocab_size if config is None else config.vocab_size
        constraints = Constraints(tokenizer, vocab_size)
        can_differ = "reasoning" in self.job.input.overrides
        for thinking in {generation.reasoning, *((True, False) if can_differ else ())}:
            reason = constraints.error(bound_to, thinking=thinking)
            if reason is not None:
                self._add(
                    ("generation", "response_format", bound_to.kind.content_key),
                    f"cannot be used: {reason}",
                    f"mend the {bound_to.kind.content_key}",
                )
                return

    def _check_chat(self, chat: ChatTemplate) -> None:
        system = self.job.input.system
        messages = [Message("user", "Hello")]
        if system is not None:
            messages.insert(0, Message("system", system))
        try:
            chat.encode(messages, reasoning=self.job.generation.reasoning)
        except PromptError as error:
            key = ("input", "system") if system is not None else ("model", "path")
            self._add(key, error.message, error.hint or "use another checkpoint")
            return
        tools = self.job.generation.tools
        if not tools or not self._usable("generation.tools"):
            return
        try:
            chat.encode(messages, reasoning=self.job.generation.reasoning, tools=tools)
        except PromptError as error:
            hint = "delete the key, or use a checkpoint that can call functions"
            self._add(("generation", "tools"), error.message, error.hint or hint)

    def check_output(self) -> None:
        """Writable, with the atomic create that parts need."""
        if not self._usable("output.path", "output.storage_options"):
            return
        output = self.job.output
        scheme, separator, _ = output.path.partition("://")
        if separator and scheme not in OUTPUT_SCHEMES:
            return  # the job's rules have said so
        self._try(
            ("output", "path"), lambda: Store.open(output.path, output.storage_options).probe()
        )

    def _usable(self, *keys: str) -> bool:
        paths = [tuple(key.split(".")) for key in keys]
        return not any(
            path[: len(wrong)] == wrong or wrong[: len(path)] == path
            for path in paths
            for wrong in self.bad
        )

    def _try(self, key: KeyPath, check: Callable[[], _T]) -> _T | None:
        try:
            return check()
        except (InputError, OutputError, CheckpointError, StorageError) as error:
            self._add_error(key, error)
            return None

    def _add_error(self, key: KeyPath, error: BatchrunError) -> None:
        if isinstance(error, StorageError):
            self.unreachable = self.unreachable or error
            self.num_unreachable += 1
        for line in error.message.splitlines():
            # The key says already whose problem it is.
            for role in ("input: ", "output: ", "checkpoint: "):
                line = line.removeprefix(role)
            self._add(key, line, error.hint)

    def _add(self, key: KeyPath, message: str, hint: str) -> None:
        self.problems.append(Problem(self.source.place(key), dotted(key), message, hint))
