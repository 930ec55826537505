"""Under NO_SKIPS, as tests/run.sh sets it, nothing can be skipped unnoticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WAYS = {
    "file": "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass\n",
    "test": "import pytest\ndef test_it(): pytest.importorskip('no_such_module')\n",
    "mark": "import pytest\n@pytest.mark.skipif(True, reason='here')\ndef test_it(): pass\n",
}


@pytest.mark.parametrize("no_skips, outcome", [("", "3 skipped"), ("1", "1 failed, 2 errors")])
def test_a_skip_fails(tmp_path, no_skips, outcome):
    for way, text in WAYS.items():
        (tmp_path / f"test_{way}.py").write_text(text)
    options = [
        "-q",
        "-p",
        "no:warnings",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "NO_SKIPS": no_skips},
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines()[-1].startswith(f"{outcome} in "), run.stdout
    assert run.stdout.count("skipped under NO_SKIPS") >= (len(WAYS) if no_skips else 0)
