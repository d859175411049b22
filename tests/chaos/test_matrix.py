"""Every row of the fault matrix is proven somewhere."""

from __future__ import annotations

import re
from pathlib import Path

from tests.chaos.matrix import ELSEWHERE, NUM_ROWS

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_has_its_proof() -> None:
    """Each row is injected here, or proven by tests that exist."""
    here = {
        int(found)
        for path in Path(__file__).parent.glob("test_*.py")
        for found in re.findall(r"^@pytest\.mark\.fault\((\d+), ", path.read_text(), re.MULTILINE)
    }
    assert here | ELSEWHERE.keys() == set(range(1, NUM_ROWS + 1))
    missing = []
    for names in ELSEWHERE.values():
        for name in names:
            path, _, function = name.partition("::")
            if f"\ndef {function}(" not in (ROOT / path).read_text():
                missing.append(name)
    assert missing == []
