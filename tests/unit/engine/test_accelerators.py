"""Accelerators are found by the names that people and Ray give them."""

from __future__ import annotations

import pytest

from batchrun.engine.accelerators import ACCELERATORS, find_accelerator
from batchrun.errors import RequestError


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("A10G", "A10G"),
        ("a10", "A10"),
        (" NVIDIA L4 ", "L4"),
        ("Tesla-A100", "A100-40G"),
        ("NVIDIA_TESLA_A100-80GB", "A100-80G"),
        ("h200", "H200"),
    ],
)
def test_names(written: str, name: str) -> None:
    """Whatever the case, the maker's name and the spelling of its size."""
    assert find_accelerator(written).name == name


def test_an_unknown_name_is_answered_with_the_known() -> None:
    """The nearest one, and all."""
    with pytest.raises(RequestError, match="'A10GG' is not known; did you mean A10G") as caught:
        find_accelerator("A10GG")
    assert all(accelerator.name in caught.value.hint for accelerator in ACCELERATORS)
    with pytest.raises(RequestError, match=r"'' is not known$"):
        find_accelerator("")


def test_sizes_are_plausible() -> None:
    """Of a device's memory an engine has most, and multiplies far more than it reads."""
    for accelerator in ACCELERATORS:
        assert 0.95 * accelerator.memory_bytes < accelerator.usable_bytes < accelerator.memory_bytes
        assert 100 < accelerator.flops / accelerator.bandwidth < 500
