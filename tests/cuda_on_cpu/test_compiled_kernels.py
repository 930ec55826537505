"""The kernels compile for every architecture by NVRTC without spills, and fit it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import kernel_registers as kernels  # noqa: E402

REGISTERS_OF_A_BLOCK = 65536


def check(configurations, arch):
    rows = [row for configuration in configurations for row in kernels.compile_one(configuration, arch)]
    print("\n".join(kernels.table(rows)))
    assert rows
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["registers"] * row["threads"] <= REGISTERS_OF_A_BLOCK, row
        assert row["shared"] <= kernels.ARCHITECTURES[arch] * 1024, row


@pytest.mark.parametrize("arch", kernels.ARCHITECTURES)
@pytest.mark.parametrize("shape", kernels.SHAPES)
def test_scan_and_step(arch, shape):
    """All rules for the oldest, a large and the newest architecture, one for those between: 3 seconds a compilation."""
    configurations = [*kernels.scans(arch, shape), *kernels.steps(shape)]
    if arch not in ("sm_75", "sm_90", "sm_120"):
        configurations = [c for c in configurations if c.family == "step" or ", delta," in c.what]
    check(configurations, arch)


@pytest.mark.parametrize("arch", kernels.ARCHITECTURES)
def test_feature_maps(arch):
    check(kernels.maps(), arch)
