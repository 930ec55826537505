"""examples/download.sh, on files of this machine."""

import hashlib
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples/download.sh"


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "original"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def download(original, target, expected, ok=True) -> str:
    code = f'fail() {{ echo "failed: $*"; exit 1; }}; source "{SCRIPT}"; download "$@"'
    command = ["bash", "-euo", "pipefail", "-c", code, "x", f"file://{original}", str(target), expected]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout


def digest(kind, path) -> str:
    return f"{kind}:{hashlib.new(kind, path.read_bytes()).hexdigest()}"


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_a_stopped_download_goes_on_and_is_checked(original, tmp_path, kind):
    target = tmp_path / "folder/target"
    target.parent.mkdir()
    target.with_name("target.part").write_bytes(original.read_bytes()[:1000])
    download(original, target, digest(kind, original))
    assert target.read_bytes() == original.read_bytes()
    assert not target.with_name("target.part").exists()
    assert download(original, target, digest(kind, original)) == ""  # not again
    target.write_bytes(b"something else")
    assert "delete it and run this again" in download(original, target, digest(kind, original), ok=False)
    assert target.read_bytes() == b"something else"


def test_a_download_that_was_stopped_while_it_was_checked(original, tmp_path):
    target = tmp_path / "target"
    target.with_name("target.part").write_bytes(original.read_bytes())
    expected = digest("sha256", original)
    original.unlink()  # nothing is asked for
    download(original, target, expected)
    assert digest("sha256", target) == expected


def test_another_file_is_refused_and_not_gone_on_with(original, tmp_path):
    target = tmp_path / "target"
    said = download(original, target, "sha256:" + "0" * 64, ok=False)
    assert f"has the sha256 checksum {digest('sha256', original)[7:]}, not 000" in said
    assert not target.exists() and not target.with_name("target.part").exists()


def test_without_a_published_checksum_the_first_one_counts(original, tmp_path):
    target = tmp_path / "target"
    assert "no checksum of target is published" in download(original, target, "first")
    assert download(original, target, "first") == ""
    target.write_bytes(b"something else")
    assert "is not what was first downloaded" in download(original, target, "first", ok=False)


def test_what_cannot_be_downloaded(original, tmp_path):
    missing = tmp_path / "missing"
    assert "cannot download" in download(missing, tmp_path / "target", "contents", ok=False)
    assert "a checksum is" in download(original, tmp_path / "target", "crc:1", ok=False)
