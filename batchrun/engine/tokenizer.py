"""Text to token ids and back, for byte-level BPE in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from batchrun.errors import CheckpointError


class Tokenizer:
    """A checkpoint's tokenizer: :meth:`load` it from its folder.

    Two encoders of one vocabulary: one that reads special-token strings as special tokens, for
    text that its author meant so, and one to which they are just text, for the words of rows.
    """

    def __init__(self, definition: Mapping[str, Any], *, bos_id: int | None) -> None:
        """``definition`` is the content of tokenizer.json; ``bos_id`` goes before every text."""
        text = json.dumps(definition)
        self._marked = tokenizers.Tokenizer.from_str(text)
        self._plain = tokenizers.Tokenizer.from_str(text)
        self._plain.encode_special_tokens = True
        for tokenizer in (self._marked, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.bos_id = bos_id
        added = self._marked.get_added_tokens_decoder()
        self.special_tokens = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        """Id of each special token's string."""
        self._added = {token_id: token.content for token_id, token in added.items()}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` and ``tokenizer_config.json`` of a checkpoint.

        :raises CheckpointError: there is none, it is damaged, or it is not byte-level BPE.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: the checkpoint has no tokenizer",
                "copy tokenizer.json and tokenizer_config.json from where the model came",
            )
        definition = read_json(path)
        _check_byte_level(path, definition)
        try:
            return cls(definition, bos_id=_bos_id(folder, definition))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{path}: not a usable tokenizer: {error}", "copy the file again"
            ) from error

    @property
    def vocab_size(self) -> int:
        """How many ids have a text."""
        return int(self._marked.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Ids of a text with ``<s>`` in front exactly once; special-token strings are special.

        With ``plain`` they are just text and nothing is put in front.

        :raises ValueError: the text holds lone surrogates, so it is no Unicode text.
        """
        if plain:
            return self.encode_plain(text)
        ids = _ids(self._marked, text)
        bos_id = self.bos_id
        if bos_id is not None and ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
        elif bos_id is not None and ids[1:2] == [bos_id]:  # one of the text, one of the tokenizer
            del ids[0]
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special, without ``<s>``.

        :raises ValueError: the text holds lone surrogates, so it is no Unicode text.
        """
        return _ids(self._plain, text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included, without a ``<s>`` at the start."""
        ids = list(ids)
        if self.bos_id is not None and ids[:1] == [self.bos_id]:
            del ids[0]
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, maybe a part of a character; empty for an unknown id."""
        table = self._bytes
        return table[token_id] if 0 <= token_id < len(table) else b""

    def output_bytes(self, vocab_size: int) -> list[bytes]:
        """What each id of a model's vocabulary adds to a generated text: nothing if special."""
        special = set(self.special_tokens.values())
        return [b"" if i in special else self.token_bytes(i) for i in range(vocab_size)]

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes by id. Bytes stand in the vocabulary as the characters of ``_byte_alphabet``."""
        alphabet = _byte_alphabet()
        vocabulary = self._marked.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            if token_id not in self._added and all(c in alphabet for c in token):
                table[token_id] = bytes(alphabet[character] for character in token)
            else:
                table[token_id] = token.encode()
        return table


def load_stop_ids(folder: Path) -> frozenset[int]:
    """The ids that end a generation: of ``generation_config.json``, else of ``config.json``.

    :raises CheckpointError: a file is damaged or the value is neither an id nor a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        value = read_json(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise CheckpointError(
                f"{path}: eos_token_id: expected a token id or a list of them, not {value!r}",
                "write e.g. [2, 11, 12]",
            )
        if ids:
            return frozenset(ids)
    return frozenset()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    :raises CheckpointError: the file cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", "copy the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object", "copy the file again")
    return value


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    text.encode()  # a UnicodeEncodeError is a ValueError; the library's own error is a TypeError
    plain = tokenizer.encode_special_tokens
    return list(tokenizer.encode(text, add_special_tokens=not plain).ids)


def _check_byte_level(path: Path, definition: Mapping[str, Any]) -> None:
    """Texts are put together from the bytes of tokens, so every token must have its bytes."""
    model = definition.get("model") or {}
    decoder = definition.get("decoder") or {}
    steps = decoder.get("decoders") or [decoder]
    kinds = [step.get("type") for step in steps]
    if model.get("type") != "BPE" or kinds != ["ByteLevel"]:
        raise CheckpointError(
            f"{path}: only byte-level BPE tokenizers are supported, not a "
            f"{model.get('type')} model with the decoder {', '.join(map(str, kinds))}",
            "use a checkpoint of the Nemotron-H family",
        )


def _bos_id(folder: Path, definition: Mapping[str, Any]) -> int | None:
    """The id that stands before every text, or None.

    tokenizer.json's post-processor says it; tokenizer_config.json's ``add_bos_token`` too.
    """
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    ids = tokenizer.encode("", add_special_tokens=True).ids
    if ids:
        return int(ids[0])
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    token = config.get("bos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not config.get("add_bos_token") or not isinstance(token, str):
        return None
    token_id = tokenizer.token_to_id(token)
    return None if token_id is None else int(token_id)


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + place): byte for place, byte in enumerate(others)}
