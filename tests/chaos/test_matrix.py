"""Every row of the fault matrix is proven somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chaos import faults
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


def test_the_faults_find_what_they_replace() -> None:
    """What a fault is put in the place of is there, also while only quick faults are injected."""
    from batchrun.cluster.worker import Worker
    from batchrun.data.local import LocalStore
    from batchrun.data.remote import RemoteStore
    from batchrun.engine.engine import Engine
    from batchrun.engine.model_runner import ModelRunner

    replaced = [(Worker, "load"), (Engine, "load"), (ModelRunner, "launch")]
    replaced += [(LocalStore, "put_if_absent"), (RemoteStore, "put_if_absent")]
    with pytest.MonkeyPatch.context() as patch:
        before = [getattr(owner, name) for owner, name in replaced]
        for (owner, name), value in zip(replaced, before, strict=True):
            patch.setattr(owner, name, value)
        faults.install()
        faults._arm_load()
        faults._arm_real({})
        faults._arm_puts([], Path())
        after = [getattr(owner, name) for owner, name in replaced]
        assert not any(new is old for new, old in zip(after, before, strict=True))
