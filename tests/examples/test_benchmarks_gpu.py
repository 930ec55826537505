"""benchmarks/gpu.py without a GPU: its dry run, what it says of broken kernels, and what it says without --dry."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from cuda_stand_in import STREAM

from fairseq_fastweights.ops import cuda

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def dry_run(gpu, tmp_path, capsys):
    """Runs it dry: (exit code, results, what it prints)."""

    def run():
        path = tmp_path / "gpu.json"
        code = gpu.main(["--dry", "--json", str(path)])
        return code, json.loads(path.read_text())["results"], capsys.readouterr().out

    return run


@pytest.fixture
def few(gpu, monkeypatch):
    """A dry run of one check, one scan and nothing else."""
    dry = gpu.DRY
    scans = {"scan": gpu.ScanCase("sum", torch.float32, 1, 2, 20, 8, 8, False)}
    monkeypatch.setattr(
        gpu, "DRY", dry._replace(checks=dry.checks[:1], scans=scans, steps={}, maps={}, memory={})
    )


def edited(monkeypatch, family, old, new):
    """The kernels of a family with a wrong line."""
    source = cuda.source

    def wrong(asked):
        text = source(asked)
        if asked != family:
            return text
        assert old in text
        return text.replace(old, new)

    monkeypatch.setattr(cuda, "source", wrong)


def test_dry_run(dry_run):
    code, results, printed = dry_run()
    assert code == 0
    made = [check for check in results["checks"] if check["passed"] is not None]
    assert len(made) >= 12 and all(check["passed"] and check["error"] <= check["bound"] for check in made)
    skipped = [check for check in results["checks"] if check["passed"] is None]
    assert [check["what"] for check in skipped] == ["side stream", "another device", "CUDA graph"]
    assert all(check["note"] == "needs a GPU" for check in skipped)
    assert len(results["times"]) == 14
    for row in results["times"]:
        assert not row["errors"] and row["least"] > 0 and row["bytes a second"] > 0
        assert {"cuda", "PyTorch"} <= row["times"].keys()
        assert all(times["median"] > 0 and times["runs"] >= 5 for times in row["times"].values())
    assert {row["pass"] for row in results["times"]} == {"forward", "forward + backward"}
    assert results["memory"] and all(
        {"cuda", "reference"} <= row["peaks"].keys() for row in results["memory"]
    )
    assert results["dry"] and results["report"] and results["fla"]["note"]
    assert "times and ratios mean nothing" in printed
    assert "| work | dtype | pass | cuda, ms |" in printed and "Checks: 12 pass, 0 fail, 3 skipped" in printed


def test_kernel_that_is_wrong(dry_run, few, monkeypatch):
    edited(monkeypatch, "scan", "+= left[i][m] * right[m][j]", "+= 1.001f * left[i][m] * right[m][j]")
    code, results, printed = dry_run()
    assert code == 1
    assert results["checks"][0]["passed"] is False and results["checks"][0]["error"] > 1e-5
    assert "FAIL    scan, sum, float32" in printed
    assert results["times"]  # it goes on


def test_kernel_that_does_not_compile(dry_run, few, monkeypatch):
    edited(monkeypatch, "scan", '#line 1 "scan.cu"', "this is not C")
    code, results, printed = dry_run()
    assert code == 1
    assert results["checks"][0]["passed"] is False and results["checks"][0]["note"]
    assert "cuda did not run" in printed
    assert "PyTorch" in results["times"][0]["times"] and "cuda" in results["times"][0]["errors"]


def test_results_that_are_not_finite_fail(gpu):
    expected = torch.ones(3, dtype=torch.float64)
    for value in (float("nan"), float("inf")):
        assert gpu.relative_error(torch.tensor([1.0, value, 1.0]), expected) == gpu.HUGE


def test_least_bytes_are_those_of_kernel_traffic(gpu):
    import kernel_traffic

    shape = kernel_traffic.Shape(8, 20, 8, 4, "delta")
    counted = kernel_traffic.scan_traffic(shape, kernel_traffic.DEVICES["H100"].limits)
    case = gpu.ScanCase("delta", torch.float32, 1, 8, 20, 8, 4, False)
    with gpu.instead_of_gpu():
        least = gpu.least_of_scan(case, gpu.BOTH, torch.device("cpu"))
    assert least == sum(row["least"] for row in counted)


class FakeStream(contextlib.nullcontext):
    """Streams, graphs and their contexts, on which nothing happens."""

    device = torch.device("cuda", 0)
    cuda_stream = STREAM

    def __init__(self, *_):
        super().__init__()

    def wait_stream(self, other):
        pass

    synchronize = replay = record = lambda self: None


class FakeEvent(FakeStream):
    def __init__(self, enable_timing):
        super().__init__()

    def elapsed_time(self, other):
        return 2.0  # ms


@pytest.fixture
def fake_gpu(gpu, monkeypatch):
    """An L4 by name, on which the meter of real GPUs runs."""
    fakes = {
        "Stream": FakeStream,
        "stream": FakeStream,
        "CUDAGraph": FakeStream,
        "graph": FakeStream,
        "Event": FakeEvent,
        "current_stream": lambda device: FakeStream(),
        "get_device_name": lambda device: "NVIDIA A100-SXM4-80GB",
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 5000,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(gpu, "BUFFER", 2**12)
    return torch.device("cpu")


def test_meter_of_a_gpu(gpu, fake_gpu):
    meter = gpu.GpuMeter(fake_gpu)
    case = gpu.ScanCase("sum", torch.float32, 1, 2, 20, 8, 8, False)
    with gpu.instead_of_gpu():
        row = gpu.time_of(meter, gpu.scan_work("scan", case, gpu.FORWARD, fake_gpu, gpu.find_fla()), 0.01)
        memory = gpu.memory_of(meter, "scan", case, gpu.find_fla())
    assert row["times"]["cuda"]["median"] == 2e-3
    assert row["bytes a second"] == row["least"] / 2e-3 and row["share"] == row["least"] / 2e-3 / 2.04e12
    assert set(memory["peaks"].values()) == {4000}


def test_checks_of_a_device(gpu, fake_gpu, monkeypatch):
    case = gpu.StepCase("sum", torch.float32, 5, 2, 8, 8)
    with gpu.instead_of_gpu():
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
        assert gpu.check_stream(case, fake_gpu).passed
        assert gpu.check_second_device(case, fake_gpu).note == "there is one device"
        found = gpu.guarded("CUDA graph, ", gpu.check_graph, case, fake_gpu)  # a graph that replays nothing
    assert found.passed is False and found.note == "the replay differs" and "CUDA graph, step" in found.what


def test_without_a_gpu(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert not printed.out and len(printed.err.splitlines()) == 1
    assert "no CUDA device" in printed.err and "--dry" in printed.err
    assert not list(tmp_path.iterdir())


def test_dry_run_stays_out_of_the_readme(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--readme"])
    assert "README" in capsys.readouterr().err
