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


@pytest.mark.parametrize("no_skips, status", [("", 0), ("1", 1)])
def test_a_skip_fails(tmp_path, no_skips, status):
    for way, text in WAYS.items():
        (tmp_path / f"test_{way}.py").write_text(text)
    for way in WAYS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "NO_SKIPS": no_skips}
        run = subprocess.run(
            [*command, f"test_{way}.py", "--rootdir", str(tmp_path)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        skipped_alone = run.returncode in (0, 5)  # 5: no test was found, which is what a skipped file is
        assert skipped_alone == (status == 0), (way, run.stdout)
        assert ("skipped under NO_SKIPS" in run.stdout) == (status == 1), (way, run.stdout)
