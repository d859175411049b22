"""The state of a prompt's beginning, kept for others that begin alike. No tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a prompt at which it is compared with others, and the hash of all before it.

    ``is_whole`` marks the place before the prompt's last token: there only the same prompt agrees.
    """

    num_tokens: int
    hash: int
    is_whole: bool = False


class Snapshot:
    """A kept state: slot and blocks together hold exactly ``token_ids``, once it is ready.

    The sequence that makes it ends a chunk there; then all of its state is copied at once.
    """

    __slots__ = ("blocks", "is_ready", "mark", "slot", "token_ids")

    def __init__(
        self, mark: Mark, token_ids: tuple[int, ...], slot: int, blocks: tuple[int, ...]
    ) -> None:
        """One whose state is still to be written."""
        self.mark = mark
        self.token_ids = token_ids
        self.slot = slot
        self.blocks = blocks
        self.is_ready = False

    @property
    def num_tokens(self) -> int:
        """Tokens that the state holds."""
        return len(self.token_ids)
