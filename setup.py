"""Packaging. The CUDA sources in cuda/ are installed as package data of fairseq_fastweights.cuda."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fairseq_fastweights/__init__.py").read_text())[1]

# ve-fairseq is fairseq's main branch as wheels for these; elsewhere fairseq-fixed is built from source
HAS_WHEEL = (
    "(python_version == '3.11' or python_version == '3.12') "
    "and platform_system == 'Linux' and platform_machine == 'x86_64'"
)
HAS_NO_WHEEL = (
    "(python_version != '3.11' and python_version != '3.12') "
    "or platform_system != 'Linux' or platform_machine != 'x86_64'"
)

EXTRAS = {
    "fairseq": [
        f"ve-fairseq==0.12.3; {HAS_WHEEL}",
        f"fairseq-fixed==0.12.3.1; {HAS_NO_WHEEL}",
        "hydra-core>=1.3,<1.4",  # 1.4 removes what fairseq uses
        "omegaconf>=2.3,<2.4",
        "sacrebleu>=2.6,<3",
    ],
    "cpu": ["numba>=0.61"],  # the CPU kernels: several times faster training and decoding without a GPU
    "cuda12": ["cupy-cuda12x>=14,<15"],
    "cuda13": ["cupy-cuda13x>=14,<15"],
    "compare": ["rich>=13", "matplotlib>=3.8", "pyyaml>=6"],  # fastweights-compare, fastweights-inspect
    # nvidia-cuda-nvrtc compiles the CUDA kernels for every architecture, without a GPU
    "test": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "packaging",
        "setuptools>=70.1",
        "pip",
        "nvidia-cuda-nvrtc>=13",
    ],
}
SUBWORDS = ["subword-nmt>=0.3.8", "sacremoses>=0.1"]  # examples/translation with PIECES=subword-nmt
EXTRAS["examples"] = EXTRAS["fairseq"] + EXTRAS["cpu"] + EXTRAS["compare"] + SUBWORDS
EXTRAS["test"] += EXTRAS["cpu"] + EXTRAS["compare"] + SUBWORDS

setup(
    name="fairseq_fastweights",
    version=VERSION,
    description="Fast-weight (linear and delta-rule) attention for fairseq",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.13",
    # 2.6: the first release whose torch.load takes the allow-list that keeps checkpoints data only
    install_requires=["torch>=2.6", "numpy>=1.22", "sentencepiece>=0.1.97"],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "fastweights-convert=fairseq_fastweights.convert.__main__:main",
            "fastweights-compare=fairseq_fastweights.compare.__main__:main",
            "fastweights-inspect=fairseq_fastweights.inspection.__main__:main",
        ]
    },
    packages=[*find_packages(include=["fairseq_fastweights*"]), "fairseq_fastweights.cuda"],
    package_dir={"fairseq_fastweights.cuda": "cuda"},
    package_data={"fairseq_fastweights.cuda": ["*.cu", "README.md"]},
)
