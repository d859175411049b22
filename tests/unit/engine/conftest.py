"""One random checkpoint and its parts for all tests of the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchrun.engine.chat import ChatTemplate
from batchrun.engine.tokenizer import Tokenizer
from tests.unit.engine.support import TINY, write_random


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights and the tiny model's tokenizer."""
    return write_random(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tiny model's tokenizer."""
    return Tokenizer.load(TINY)


@pytest.fixture(scope="session")
def chat(tokenizer: Tokenizer) -> ChatTemplate:
    """The tiny model's chat template."""
    return ChatTemplate.load(TINY, tokenizer)
