"""Where the CUDA sources lie."""

from pathlib import Path


def cuda_source_dir() -> Path:
    """The folder of the ``*.cu`` files: inside the package when installed from a wheel, beside it in a checkout.

    Raises:
        FileNotFoundError: neither exists, so the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cuda", package.parent / "cuda"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no cuda/ folder in or beside {package}: install fairseq_fastweights again")
