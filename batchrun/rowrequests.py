"""A row -> the engine's requests for its samples, or why there are none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

from batchrun.engine.chat import PromptError
from batchrun.engine.engine import Engine
from batchrun.engine.params import SamplingParams
from batchrun.engine.request import Request
from batchrun.errors import CheckpointError, RequestError
from batchrun.job import Job
from batchrun.prompts import PromptBuilder
from batchrun.records import ErrorKind, Generated, Lease, Row, RowError


class RequestBuilder:
    """Makes requests of the rows of one job for one engine."""

    def __init__(self, job: Job, engine: Engine) -> None:
        """Raises CheckpointError for a model that rows cannot become prompts of."""
        self._engine = engine
        self._prompts = PromptBuilder(job)
        if engine.chat is None:
            raise CheckpointError(
                "the checkpoint has no chat template, so rows cannot become prompts",
                "copy tokenizer_config.json or chat_template.jinja from where the model came",
            )
        self._chat = engine.chat

    def build(
        self, lease: Lease, row: Row, known: Mapping[int, Generated | None]
    ) -> list[Request] | RowError:
        """One request for each sample of ``known``, with what is known of it."""
        prompt = self._prompts.build(row)
        if isinstance(prompt, RowError):
            return prompt
        try:
            encoded = self._chat.encode(
                prompt.messages, reasoning=prompt.reasoning, tools=prompt.tools
            )
            params = SamplingParams(**cast(dict[str, Any], prompt.params))
        except PromptError as error:
            return error.row_error
        except RequestError as error:
            return RowError(ErrorKind.INVALID_PROMPT, error.message)
        refusal = self._engine.admission_error(
            len(encoded.token_ids), params, thinking=encoded.thinking
        )
        if refusal is not None:
            return refusal
        seed = row_seed(params.seed or 0, lease.shard.path, row.index)
        return [
            Request(
                key=(lease.attempt, row.ordinal),
                prompt_token_ids=encoded.token_ids,
                params=params,
                seed=seed,
                sample=sample,
                thinking=encoded.thinking,
                generated=generated,
            )
            for sample, generated in known.items()
        ]


def row_seed(job_seed: int, shard_path: str, row_index: int) -> int:
    """The seed of a row: 63 bits that depend on the job's seed, the file and the row alone."""
    text = f"{job_seed}\0{row_index}\0{shard_path}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
