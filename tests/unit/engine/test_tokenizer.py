"""The tokenizer: Hugging Face's ids, every text back byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from batchrun.engine.tokenizer import Tokenizer, load_stop_ids
from batchrun.errors import CheckpointError
from tests.unit.engine.support import TINY

TOKENIZER = Tokenizer.load(TINY)
HUGGING_FACE = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))


@given(st.text(max_size=60))
def test_every_text_comes_back(text: str) -> None:
    """Encoding and decoding lose no character of any plane, special-token strings included."""
    assert TOKENIZER.decode(TOKENIZER.encode_plain(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text.removeprefix("<s>")


@pytest.mark.parametrize("text", ["", "What is 3+4?", " a\n\n b", "<SPECIAL_11>User\né😀", "</s>x"])
def test_ids_are_those_of_hugging_face(text: str) -> None:
    """The default encoding is what transformers gives for the same file."""
    assert TOKENIZER.encode(text) == HUGGING_FACE(text)["input_ids"]


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_ids_decode_as_hugging_face_decodes(ids: list[int]) -> None:
    """Also ids that form no whole characters; only a leading <s> is dropped."""
    expected = HUGGING_FACE.decode(ids[1:] if ids[:1] == [1] else ids)
    assert TOKENIZER.decode(ids) == expected


def test_the_first_token_stands_once() -> None:
    """<s> goes in front exactly once, whether the text has it or not; plain text has none."""
    assert TOKENIZER.encode("hi")[0] == 1
    assert TOKENIZER.encode("<s>hi") == TOKENIZER.encode("hi")
    assert 1 not in TOKENIZER.encode("hi", plain=True)


def test_special_strings_are_text_in_plain_text(tokenizer: Tokenizer) -> None:
    """A row cannot write a special token."""
    special = set(tokenizer.special_tokens.values())
    for mark in tokenizer.special_tokens:
        assert not special.intersection(tokenizer.encode_plain(f"a{mark}b"))
        assert tokenizer.special_tokens[mark] in tokenizer.encode(f"a{mark}b")


def test_tokens_have_their_bytes(tokenizer: Tokenizer) -> None:
    """The bytes of the tokens of a text are the text's; an unknown id has none."""
    ids = tokenizer.encode_plain("é😀")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "é😀".encode()
    assert len(ids) == 6
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.output_bytes(500)[12] == tokenizer.output_bytes(500)[499] == b""


def test_lone_surrogates_are_a_value_error(tokenizer: Tokenizer) -> None:
    """What is no Unicode text is refused, not mangled."""
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode_plain("a\ud800")


def test_without_a_post_processor_the_config_says_whether_bos_is_added(tmp_path: Path) -> None:
    """add_bos_token of tokenizer_config.json counts where tokenizer.json says nothing."""
    definition = json.loads((TINY / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert 1 not in Tokenizer.load(tmp_path).encode("hi")
    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(tmp_path).encode("hi")[0] == 1


def test_a_missing_damaged_or_other_tokenizer_is_named(tmp_path: Path) -> None:
    """Each is a CheckpointError with the file's path."""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the checkpoint has no"):
        Tokenizer.load(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    path.write_text(json.dumps({"model": {"type": "WordPiece"}, "decoder": {"type": "WordPiece"}}))
    with pytest.raises(CheckpointError, match="only byte-level BPE"):
        Tokenizer.load(tmp_path)
    path.write_text(json.dumps({"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}))
    with pytest.raises(CheckpointError, match="not a usable tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 11, 12]}, {"eos_token_id": 5}, {2, 11, 12}),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, {7}),
        ({}, {"eos_token_id": 5}, {5}),
        (None, {"eos_token_id": [5, 6]}, {5, 6}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_stop_ids_come_from_the_generation_config(
    tmp_path: Path, generation: object, config: object, expected: set[int]
) -> None:
    """A list or one id, of generation_config.json, else of config.json."""
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_stop_ids(tmp_path) == expected


def test_stop_ids_of_a_wrong_type_are_named(tmp_path: Path) -> None:
    """A string is not an id."""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="eos_token_id"):
        load_stop_ids(tmp_path)
