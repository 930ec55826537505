"""The kernels compile for every architecture by NVRTC without spills, and fit it.

For every change the oldest and the newest architecture and two shapes; the rest, some 150 compilations, is marked long:
the committed table of registers, which names the sources that it was made of, has all of them.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import kernel_registers as kernels  # noqa: E402

REGISTERS_OF_A_BLOCK = 65536
ARCHITECTURES = list(kernels.ARCHITECTURES)


def long_but(some, everything):
    """The parameters ``everything``, of which all but ``some`` are long."""
    assert set(some) < set(everything)
    return [pytest.param(x, marks=() if x in some else pytest.mark.long) for x in everything]


SOME_SHAPES = long_but(("wt103 small, DPFP-1", "head 64, ELU, with z"), kernels.SHAPES)
SOME_ARCHITECTURES = long_but((ARCHITECTURES[0], ARCHITECTURES[-1]), ARCHITECTURES)


def check(configurations, arch):
    rows = [row for configuration in configurations for row in kernels.compile_one(configuration, arch)]
    print("\n".join(kernels.table(rows)))
    assert rows
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["registers"] * row["threads"] <= REGISTERS_OF_A_BLOCK, row
        assert row["shared"] <= kernels.ARCHITECTURES[arch] * 1024, row


@pytest.mark.parametrize("shape", SOME_SHAPES)
def test_scan_and_step(shape):
    """All rules at all sizes for one architecture: 3 seconds a compilation."""
    check([*kernels.scans("sm_90", shape), *kernels.steps(shape)], "sm_90")


@pytest.mark.parametrize("arch", SOME_ARCHITECTURES)
def test_the_largest_and_decoding(arch):
    """Where most registers are in use; the other sizes and rules are in the committed table, below."""
    check([c for c in kernels.scans(arch, "head 128, ELU") if ", gated" not in c.what], arch)
    check([c for name in kernels.SHAPES for c in kernels.steps(name)], arch)


@pytest.mark.parametrize("arch", SOME_ARCHITECTURES)
def test_feature_maps(arch):
    check(kernels.maps(), arch)


def test_the_committed_table_has_all_of_these_kernels():
    """Every configuration on every architecture, compiled by benchmarks/kernel_registers.py since the last change."""
    readme = (Path(kernels.ROOT) / "benchmarks/README.md").read_text()
    assert f"`{kernels.fingerprint()}`" in readme, (
        "run: python benchmarks/kernel_registers.py --readme (6 minutes)"
    )
    section = readme.partition("<!-- registers -->")[2].partition("<!-- /registers -->")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    expected = {c.what for c in kernels.configurations("sm_90")}
    assert {row[1] for row in rows} == expected
    for row in rows:
        assert len(row[4].split(", ")) == len(kernels.ARCHITECTURES), row
        assert row[5] == "0", row
