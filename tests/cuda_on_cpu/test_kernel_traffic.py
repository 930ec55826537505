"""The kernels move little more than they must: bytes counted in the executor, at the sizes of real models."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import kernel_traffic  # noqa: E402


@pytest.mark.parametrize("work", kernel_traffic.SHAPES)
def test_bytes_are_near_the_least_possible(work):
    shape = kernel_traffic.SHAPES[work]
    found = kernel_traffic.traffic(shape, kernel_traffic.DEVICES["H100"].limits)
    assert len(found) == (2 if shape.tokens else 1)
    for row in found:
        assert 1 <= row["moved"] / row["least"] <= kernel_traffic.ALLOWED[row["kernel"]], row
