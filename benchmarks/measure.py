"""What every benchmark shares: interleaved timing, the machine's description, JSON and tables in README.md."""

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Callable, Dict, List

import torch


def machine() -> Dict[str, object]:
    """The processor, its threads and the versions that matter."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        name = names[0] if names else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def timings(candidates: Dict[str, Callable[[], None]], repeats: int) -> Dict[str, List[float]]:
    """Seconds of each run. The candidates take turns, so that a slow moment of the machine hits all of them."""
    for run in candidates.values():
        run()  # allocations and first-call costs
    seconds: Dict[str, List[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: List[float]) -> Dict[str, float]:
    """Median and spread (maximum - minimum over median) in seconds."""
    median = statistics.median(seconds)
    return {
        "median": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "runs": len(seconds),
    }


def write_json(path: str, results: object) -> None:
    """Machine and results, for other programs."""
    Path(path).write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print(f"written to {path}")


def write_section(name: str, command: str, table: str) -> None:
    """Replace what stands between <!-- name --> and <!-- /name --> in benchmarks/README.md."""
    path = Path(__file__).with_name("README.md")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text().partition(start)
    _, _, after = rest.partition(end)
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    path.write_text(f"{before}{start}\n`{command}` ({where})\n\n{table}\n{end}{after}")
    print(f"written to {path}")
