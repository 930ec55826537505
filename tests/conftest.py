"""Every test: one torch thread, a fixed seed, and new memory that shows whether anyone read it unwritten."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/cuda_on_cpu")]

from cuda_stand_in import instead_of_gpu  # noqa: E402


@pytest.fixture(autouse=True)
def reproducible():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def cupy():
    """Backend "cuda" runs on CPU tensors; the value is what stands in for CuPy and notes the launches."""
    with instead_of_gpu() as stand_in:
        yield stand_in


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty and its relatives return NaN, so a result that used memory nobody wrote is NaN too."""

    def poison(function):
        def filled(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return filled

    for owner in (torch, torch.Tensor):
        for name in ("empty", "empty_like", "new_empty", "empty_strided"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def pytest_collection_modifyitems(items):
    """Tests that share a fixture of their file run in one worker (pytest --dist loadgroup), which makes it once."""
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
        if any(definition.scope == "module" for found in definitions for definition in found):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Under tests/run.sh, which installs everything, a skipped test is a failed one: nobody would notice it."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("NO_SKIPS") and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped under NO_SKIPS: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """The same for a whole file that skips itself while it is read (pytest.importorskip at its top)."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("NO_SKIPS"):
        report.outcome, report.longrepr = "failed", f"skipped under NO_SKIPS: {report.longrepr}"
