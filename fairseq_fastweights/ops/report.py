"""Which backends run on this machine, and why the others do not.

python -m fairseq_fastweights.ops.report
"""

import importlib.metadata
import importlib.util
import platform
from typing import Iterator, List

import torch

from .dispatch import choose, refusals

PACKAGES = ("torch", "numba", "llvmlite", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "numpy")


def version(package: str) -> str:
    """The installed version of a package, or "-"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def devices() -> List[torch.device]:
    """The CPU and every CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", n) for n in range(torch.cuda.device_count()))]


def lines() -> Iterator[str]:
    """The report."""
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    yield ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield f"torch is built for CUDA {torch.version.cuda or '-'}; CUDA devices: {torch.cuda.device_count()}"
    for device in devices():
        yield ""
        yield f"tensors on {device}{describe(device)}"
        reasons = refusals(device)
        chosen = choose("auto", device)
        for backend, reason in reasons.items():
            if reason is not None:
                yield f"  {backend:9} no: {reason}"
            else:
                yield f"  {backend:9} yes{', taken by auto' if choose(backend, device) is chosen else ''}"


def describe(device: torch.device) -> str:
    """Name, architecture and limits of a CUDA device."""
    if device.type == "cpu":
        return f": {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 0) // 1024
    return (
        f": {found.name}, sm_{found.major}{found.minor}, {found.multi_processor_count} multiprocessors, "
        f"{found.total_memory / 2**30:.0f} GiB, {shared} KiB of shared memory a block"
    )


if __name__ == "__main__":
    print("\n".join(lines()))
