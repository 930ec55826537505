"""Registers, shared memory and spills of the CUDA kernels, compiled for every architecture without a GPU.

    python benchmarks/kernel_registers.py             # 2 minutes; needs pip install nvidia-cuda-nvrtc
    python benchmarks/kernel_registers.py --arch sm_90 --readme

NVRTC, the compiler that CuPy uses, compiles each configuration that the architectures of this project use, as
ops/cuda_scan.py would ask for it on a GPU of that kind, and ptxas says what it needs.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import torch
from measure import write_json, write_section

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/cuda_on_cpu")]

from nvrtc_compiler import compile_cuda  # noqa: E402

from fairseq_fastweights.ops import cuda  # noqa: E402
from fairseq_fastweights.ops.cuda_scan import defines_of, plan  # noqa: E402
from fairseq_fastweights.ops.cuda_step import step_cut  # noqa: E402

# architecture: KiB of shared memory a block may ask for
ARCHITECTURES = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
}
# widths of keys and values, tokens: what the architectures make of a sentence or a text
SHAPES = {
    "wt103 small, DPFP-1": (32, 16, 256),
    "wt103 medium, DPFP-1": (64, 32, 384),
    "head 64, ELU": (64, 64, 256),
    "head 64, DPFP-3": (384, 64, 256),
    "head 64, DPFP-3, one chunk": (384, 64, 32),
    "head 64, ELU, with z": (64, 65, 256),  # the sum rule's normaliser is a column of the values
    "head 128, ELU": (128, 128, 256),
}
RULES = {"sum": (0, False), "delta": (1, False), "gated-delta": (1, True)}  # ERASE, DECAY


class Configuration(NamedTuple):
    """One compilation."""

    what: str
    family: str
    defines: Tuple[Tuple[str, int], ...]
    shared: Dict[str, int]  # dynamic, by kernel


def configurations(arch: str) -> Iterator[Configuration]:
    """What a GPU of this architecture would be asked to compile: all shapes and rules, and half precision of some."""
    limits = cuda.Limits(ARCHITECTURES[arch] * 1024, 100)
    for (name, (dk, dv, tokens)), (rule, (erase, decay)) in itertools.product(SHAPES.items(), RULES.items()):
        for dtype in [torch.float32] if rule != "delta" else [torch.float32, torch.bfloat16]:
            cut = plan(800, tokens, dk, dv, erase, decay, False, 0, limits)
            defines = defines_of(cut, dtype, dk, dv, erase, decay, erase > 0, int(dv % 4 == 0))
            what = f"{name}, {rule}, {str(dtype).replace('torch.', '')}"
            yield Configuration(what, "scan", tuple(sorted(defines.items())), cut.shared)
    for name, (dk, dv, _) in SHAPES.items():
        for is_aligned in (0, 1) if dv % 4 == 0 else (0,):
            columns, threads = step_cut(dk, dv, is_aligned)
            defines = {
                "NUMBER": 0,
                "ALIGNED": is_aligned,
                "DK": dk,
                "DV": dv,
                "DVB": columns,
                "THREADS": threads,
            }
            yield Configuration(f"{name}, aligned {is_aligned}", "step", tuple(sorted(defines.items())), {})


def compile_one(configuration: Configuration, arch: str) -> List[dict]:
    """A row for each kernel."""
    options = [f"-D{key}={value}" for key, value in configuration.defines]
    compiled = compile_cuda(cuda.source(configuration.family), arch, options)
    threads = dict(configuration.defines)["THREADS"]
    return [
        {
            "arch": arch,
            "configuration": configuration.what,
            "kernel": kernel,
            "threads": threads,
            "registers": usage.registers,
            "shared": configuration.shared.get(kernel, 0) + usage.static_shared_bytes,
            "spilled": usage.spill_store_bytes + usage.spill_load_bytes,
        }
        for kernel, usage in compiled.kernels.items()
    ]


def table(rows: List[dict]) -> List[str]:
    """Markdown: a line for each kernel and configuration, registers by architecture."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    lines = [
        "| kernel | configuration | threads | shared, KiB | registers on " + ", ".join(archs) + " | spilled |"
    ]
    lines.append("|---" * 6 + "|")
    for key in dict.fromkeys((row["kernel"], row["configuration"]) for row in rows):
        same = [row for row in rows if (row["kernel"], row["configuration"]) == key]
        shared = sorted({round(row["shared"] / 1024, 1) for row in same})
        cells = [*key, "/".join(str(n) for n in sorted({row["threads"] for row in same}))]
        cells += ["/".join(map(str, shared)), ", ".join(str(row["registers"]) for row in same)]
        lines.append("| " + " | ".join([*cells, str(sum(row["spilled"] for row in same))]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated; default all")
    parser.add_argument("--json", default="kernel_registers.json")
    parser.add_argument("--readme", action="store_true", help="put the table into benchmarks/README.md")
    args = parser.parse_args()
    rows = []
    for arch in args.arch or ARCHITECTURES:
        for n, configuration in enumerate(configurations(arch)):
            rows += compile_one(configuration, arch)
            print(f"\r{arch}: {n + 1} configurations", end="", flush=True, file=sys.stderr)
        print(file=sys.stderr)
    lines = table(rows)
    print("\n".join(lines))
    write_json(args.json, rows)
    if args.readme:
        write_section("registers", "python benchmarks/kernel_registers.py --readme", "\n".join(lines))


if __name__ == "__main__":
    main()
