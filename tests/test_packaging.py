"""What pip installs: all packages, the CUDA sources, and versions that were tested."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fairseq_fastweights.ops.cuda_sources import cuda_source_dir

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fairseq_fastweights", "cuda")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what git tracks, without network."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    (source / "cuda" / "example.cu").write_text("// a kernel\n")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(source / "out"), str(source)], check=True)
    (path,) = (source / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel):
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_every_module_and_the_cuda_sources(wheel):
    names = set(wheel.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fairseq_fastweights").rglob("*.py")}
    assert modules <= names
    assert {"fairseq_fastweights/cuda/README.md", "fairseq_fastweights/cuda/example.cu"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)


def test_cuda_sources_are_found_in_a_wheel_and_in_a_checkout(wheel, tmp_path):
    assert cuda_source_dir() == ROOT / "cuda"
    wheel.extractall(tmp_path)
    code = "from fairseq_fastweights.ops.cuda_sources import cuda_source_dir as d; print(d() / 'example.cu')"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert Path(found) == tmp_path / "fairseq_fastweights/cuda/example.cu"
    assert Path(found).exists()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_one_fairseq_for_every_python(wheel, python):
    environment = {
        "extra": "fairseq",
        "python_version": python,
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    required = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    chosen = [r.name for r in required if "fairseq" in r.name and r.marker.evaluate(environment)]
    assert chosen == (["fairseq-fixed"] if python == "3.10" else ["ve-fairseq"])


def test_constraints_lie_within_what_setup_allows(wheel):
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    tested = {}
    for requirement in (Requirement(line) for line in lines if line):
        if requirement.marker is None or requirement.marker.evaluate():
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{requirement.name} is not pinned"
            tested[requirement.name] = pin.version
    checked = 0
    for requirement in (Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")):
        if requirement.name in tested:
            assert requirement.specifier.contains(tested[requirement.name]), requirement
            checked += 1
    assert checked >= 8
