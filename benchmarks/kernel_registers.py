"""Registers, shared memory and spills of the CUDA kernels, compiled for every architecture without a GPU.

    python benchmarks/kernel_registers.py --readme    # 6 minutes; needs pip install nvidia-cuda-nvrtc
    python benchmarks/kernel_registers.py --arch sm_90

NVRTC, the compiler that CuPy uses, compiles each configuration that the architectures of this project use, as
ops/cuda_scan.py would ask for it on a GPU of that kind, and ptxas says what it needs.
"""

import argparse
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import torch
from measure import write_json, write_section

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/cuda_on_cpu")]

from nvrtc_compiler import compile_cuda  # noqa: E402

from fairseq_fastweights.ops import cuda  # noqa: E402
from fairseq_fastweights.ops.cuda_features import Address, address_cut, address_defines  # noqa: E402
from fairseq_fastweights.ops.cuda_scan import defines_of, plan  # noqa: E402
from fairseq_fastweights.ops.cuda_step import step_defines  # noqa: E402

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
    "head 64, ELU, with z": (64, 65, 256),  # the sum rule's normaliser is a column of the values
    "head 64, DPFP-3": (384, 64, 256),
    "head 64, DPFP-3, one chunk": (384, 64, 32),
    "head 128, ELU": (128, 128, 256),
}
IN_HALF_TOO = "head 64, ELU"
RULES = {"sum": (0, False), "delta": (1, False), "gated-delta": (1, True)}  # ERASE, DECAY
MAPS = {
    "DPFP-1, width 16": (16, Address("dpfp", 32, "sum", 1.0, 0.0, nu=1)),
    "DPFP-3, width 64": (64, Address("dpfp", 384, "sum", 1.0, 0.0, nu=3)),
    "ELU, width 64": (64, Address("elu", 64, "sum", 1.0, 0.0)),
    "FAVOR+ 64, width 64": (64, Address("favor", 128, "sum", 1.0, 0.0, directions=64)),
}


class Configuration(NamedTuple):
    """One compilation."""

    what: str
    family: str
    defines: Tuple[Tuple[str, int], ...]
    shared: Dict[str, int]  # dynamic, by kernel


def scans(arch: str, shape: str) -> Iterator[Configuration]:
    """All rules at one shape in float32, and the delta rule in bfloat16 at IN_HALF_TOO."""
    dk, dv, tokens = SHAPES[shape]
    limits = cuda.Limits(ARCHITECTURES[arch] * 1024, 100)
    for rule, (erase, decay) in RULES.items():
        for dtype in (torch.float32, torch.bfloat16)[: 2 if shape == IN_HALF_TOO and rule == "delta" else 1]:
            cut = plan(800, tokens, dk, dv, erase, decay, False, 0, limits)
            defines = defines_of(cut, dtype, dk, dv, erase, decay, erase > 0, decay, int(dv % 4 == 0))
            what = f"{shape}, {rule}, {str(dtype).replace('torch.', '')}"
            yield Configuration(what, "scan", tuple(sorted(defines.items())), cut.shared)


def steps(shape: str) -> Iterator[Configuration]:
    """Decoding in float32, rows aligned or not."""
    dk, dv, _ = SHAPES[shape]
    for is_aligned in (0, 1)[: 2 if dv % 4 == 0 else 1]:
        defines = step_defines(torch.float32, dk, dv, is_aligned)
        what = f"{shape}, {'' if is_aligned else 'not '}aligned"
        yield Configuration(what, "step", tuple(sorted(defines.items())), {})


def maps() -> Iterator[Configuration]:
    """Feature maps of float32 and float16 projections."""
    for name, (width, address) in MAPS.items():
        for dtype in (torch.float32, torch.float16):
            defines = address_defines(address, dtype, torch.float32, width, 1)
            shared = address_cut(address.map_name, width, address.nu, address.directions, 1)[-1]
            what = f"{name}, {str(dtype).replace('torch.', '')}"
            kernels = dict.fromkeys(("address_forward", "address_backward"), shared)
            yield Configuration(what, "feature_map", tuple(sorted(defines.items())), kernels)


def configurations(arch: str) -> List[Configuration]:
    """What a GPU of this architecture would be asked to compile."""
    by_shape = [c for shape in SHAPES for c in (*scans(arch, shape), *steps(shape))]
    return [*by_shape, *maps()]


def fingerprint() -> str:
    """Of all sources and configurations: a table with another one is out of date."""
    asked = [cuda.source(family) for family in ("scan", "step", "feature_map")]
    asked += [repr((arch, configurations(arch))) for arch in ARCHITECTURES]
    return hashlib.sha256("\n".join(asked).encode()).hexdigest()[:12]


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
        f"Of the sources and configurations `{fingerprint()}`.",
        "",
        "| kernel | configuration | threads | shared, KiB | registers on "
        + ", ".join(archs)
        + " | spilled |",
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
    jobs = [(c, arch) for arch in args.arch or ARCHITECTURES for c in configurations(arch)]
    rows = []
    with ThreadPoolExecutor() as pool:  # NVRTC lets go of the interpreter
        for n, found in enumerate(pool.map(lambda job: compile_one(*job), jobs)):
            rows += found
            print(f"\r{n + 1} of {len(jobs)} compiled", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    lines = table(rows)
    print("\n".join(lines))
    write_json(args.json, rows)
    if args.readme:
        asked = "".join(f" --arch {arch}" for arch in args.arch or ())
        write_section("registers", f"python benchmarks/kernel_registers.py{asked} --readme", "\n".join(lines))


if __name__ == "__main__":
    main()
