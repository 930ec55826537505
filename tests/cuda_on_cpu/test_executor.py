"""The CPU executor of CUDA kernels: right results in any order, every planted bug found, exact counts of traffic."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cuda_executor
from cuda_executor import KernelFault, RawModule, running, settings, watch

FILE = "kernels_for_tests.cu"
SOURCE = (Path(__file__).parent / FILE).read_text()
ORDERS = [(0, 0), (1, 0), (2, 0), (2, 1)]


def kernel(name, *bugs, check=False):
    return RawModule(SOURCE, [f"-D{bug}" for bug in bugs], check, FILE).get_function(name)


def line_of(text):
    (line,) = [i for i, line in enumerate(SOURCE.splitlines(), 1) if text in line]
    return f"{FILE}:{line}"


# ---- launches, each compared with torch ----


def matrix_product(*bugs, m=13, k=21, n=10, check=False, **launch):
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.full((m, n), math.nan)
    run = kernel("matrix_product", *bugs, check=check)
    sizes = [np.int32(size) for size in (m, k, n)]
    run((math.ceil(n / 8), math.ceil(m / 8)), (8, 8), (a, b, c, *sizes), shared_mem=2 * 8 * 8 * 4, **launch)
    torch.testing.assert_close(c, a @ b)
    return run


def block_sum(*bugs, n=300, check=False, **launch):
    blocks = math.ceil(n / 64)
    x, sums, total = torch.randn(n), torch.full((blocks,), math.nan), torch.zeros(1)
    run = kernel("block_sum", *bugs, check=check)
    run((blocks,), (64,), (x, sums, total, np.int32(n)), **launch)
    torch.testing.assert_close(sums, torch.stack([part.sum() for part in x.split(64)]))
    torch.testing.assert_close(total[0], x.sum())


def warps(*bugs, check=False, **launch):
    x, y, z = torch.randn(2, 32), torch.empty(2, 32), torch.empty(2, 32)
    kernel("warps", *bugs, check=check)((1,), (64,), (x, y, z), **launch)
    torch.testing.assert_close(y, x.cumsum(1))
    torch.testing.assert_close(z, x.flip(1))


def read_then_write(*bugs, check=False, **launch):
    y = torch.zeros(64)
    kernel("read_then_write", *bugs, check=check)((1,), (64,), (y,), **launch)
    assert (y == 1).all()


def scale4(begin=0, check=False, **launch):
    x, y = torch.randn(264), torch.zeros(264)
    kernel("scale4", check=check)((2,), (32,), (x, y, np.float32(3), np.int32(begin)), **launch)
    torch.testing.assert_close(y[begin : begin + 256], 3 * x[begin : begin + 256])


def language(check=False, **launch):
    x, y = torch.randn(32, 2), torch.zeros(32, 3)
    pairs = np.zeros((32, 2), np.uint32)
    halves, maths = torch.zeros(32, dtype=torch.float16), torch.zeros(32)
    strides = np.int64(2), np.int64(3)
    arguments = (x[:, 1], strides[0], y[:, 2], strides[1], pairs, halves, maths)
    kernel("language_kernel", check=check)((1,), (32,), arguments, **launch)
    s, lane = x[:, 1], torch.arange(32)
    torch.testing.assert_close(y[:, 2], sum(2**i * s[lane ^ i] for i in range(4)))
    assert not y[:, :2].any()
    assert (pairs[:, 0] == sum(1 << i for i in range(32) if s[i] > 0)).all()
    assert (pairs[:, 1] == 5).all()
    assert torch.equal(halves, s.half())
    down = s[torch.where(lane % 8 < 5, lane + 3, lane)]
    other = s[lane // 16 * 16 + 1]
    torch.testing.assert_close(
        maths, down + other + s.exp() + s.relu() + 0.5 + lane.clamp(min=3) + lane.clamp(max=3)
    )


def half_warps(check=False, **launch):
    y = torch.full((32,), -1.0)
    kernel("half_warps", check=check)((1,), (32,), (y,), **launch)
    assert y.tolist() == [i ^ 1 for i in range(30)] + [30, -1]


LAUNCHES = [matrix_product, block_sum, warps, half_warps, read_then_write, scale4, language]


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("order,seed", ORDERS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_right_kernels_give_right_results_and_no_report(launch, order, seed, check):
    launch(check=check, order=order, seed=seed)


# ---- planted bugs ----

BUGS = [
    (matrix_product, "BUG_READ_TOO_EARLY", "race-read-after-write"),
    (matrix_product, "BUG_WRITE_TOO_EARLY", "race-write-after-read"),
    (matrix_product, "BUG_OUT_OF_BOUNDS", "out-of-bounds-global"),
    (matrix_product, "BUG_SHARED_OUT_OF_BOUNDS", "out-of-bounds-shared"),
    (matrix_product, "BUG_UNINITIALISED", "uninitialised-shared-read"),
    (matrix_product, "BUG_WRITE_TO_CONST", "write-to-const"),
    (block_sum, "BUG_ONE_PLACE_FOR_ALL_BLOCKS", "race-write-after-write"),
    (block_sum, "BUG_PLAIN_AND_ATOMIC", "race-read-after-write"),
    (warps, "BUG_EXCHANGE_BY_SHUFFLE", "race-read-after-write"),
    (read_then_write, "BUG_ONLY_THE_WARP_WAITS", "race-write-after-read"),
]


@pytest.mark.parametrize("order,seed", ORDERS)
@pytest.mark.parametrize("launch,bug,kind", BUGS)
def test_bugs_of_memory_are_found_in_any_order(launch, bug, kind, order, seed):
    with pytest.raises(KernelFault, match=rf"{kind} at {FILE}:\d+: block \d+ thread \(\d+,\d+,0\)"):
        launch(bug, check=True, order=order, seed=seed)


BUGS_OF_MEETING = [
    (matrix_product, "BUG_DIVERGENT_BARRIER", "divergent-barrier"),
    (matrix_product, "BUG_EXIT_BEFORE_BARRIER", "barrier-after-exit"),
    (warps, "BUG_DEADLOCK", "deadlock"),
    (warps, "BUG_SHUFFLE_FROM_EXITED_LANE", "warp-op-after-exit"),
    (warps, "BUG_SHUFFLE_FROM_EXITED_LANE", "shuffle-from-absent-lane"),
    (warps, "BUG_SHUFFLE_FROM_ABSENT_LANE", "shuffle-from-absent-lane"),
    (warps, "BUG_NOT_IN_ITS_MASK", "lane-not-in-its-mask"),
    (warps, "BUG_DIFFERENT_WARP_OPS", "divergent-warp-op"),
]


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("launch,bug,kind", BUGS_OF_MEETING)
def test_bugs_of_meeting_threads_are_found_without_the_check_too(launch, bug, kind, check):
    with pytest.raises(KernelFault, match=rf"{kind}.*{FILE}:\d+"):
        launch(bug, check=check)


def test_a_race_is_reported_with_its_line_and_both_threads():
    place = line_of("// tiles")
    text = rf"race-read-after-write at {place}: block 0 thread \(\d,\d,0\), dynamic shared byte \d+, "
    with pytest.raises(KernelFault, match=text + r"written by block 0 thread \(\d,\d,0\)"):
        matrix_product("BUG_READ_TOO_EARLY", check=True)


def test_a_deadlock_says_who_waits_where():
    text = r"block 0: 32 threads wait for __syncthreads at \S+; 32 threads wait for a warp operation at \S+"
    with pytest.raises(KernelFault, match=text):
        warps("BUG_DEADLOCK")


def test_a_failed_assertion_stops_the_launch():
    with pytest.raises(
        KernelFault, match=rf"failed: assert\(begin >= 0\) at {line_of('assert(begin')}, block 0"
    ):
        scale4(begin=-1)


def test_misaligned_access():
    with pytest.raises(KernelFault, match=rf"misaligned: .* at {FILE}:\d+, the address is 4 modulo 64"):
        scale4(begin=1, check=True)


@pytest.mark.parametrize("begin,where", [(8, "past"), (1 << 24, "")])
def test_out_of_bounds_near_and_far(begin, where):
    with pytest.raises(KernelFault, match=rf"out-of-bounds-global.*{where}"):
        x, y = torch.zeros(264), torch.zeros(264)
        kernel("scale4", check=True)((2,), (64,), (x, y, np.float32(3), np.int32(begin)))


def test_a_null_pointer_is_no_memory():
    run, y = kernel("copy_strided", check=True), torch.zeros(4)
    one = np.int64(1)
    run((1,), (32,), (None, y, np.int32(4), one, one))
    assert (y == -1).all()
    with pytest.raises(KernelFault, match="writes near a null pointer"):
        run((1,), (32,), (y, None, np.int32(4), one, one))


def test_shared_memory_starts_as_nan_in_every_run():
    code = """
    extern "C" __global__ void unset(float* y) {
      __shared__ volatile float s[32];
      extern __shared__ float smem_raw[];
      y[blockIdx.x] = s[3] + smem_raw[1];
      s[3] = smem_raw[1] = 1.f;
    }"""
    y = torch.zeros(3)
    RawModule(code).get_function("unset")((3,), (1,), (y,), shared_mem=8)
    assert y.isnan().all()


def test_line_directives_name_the_files():
    first = '#line 7 "common.cu"\n__device__ float next(const float* x) { return x[1]; }\n'
    second = '#line 1 "main.cu"\nextern "C" __global__ void run(const float* x, float* y) {\n  y[0] = next(x);\n}\n'
    run = RawModule(first + second, check=True).get_function("run")
    with pytest.raises(KernelFault, match=r"out-of-bounds-global at common\.cu:7 \(called at main\.cu:2\)"):
        run((1,), (1,), (torch.zeros(1), torch.zeros(1)))


# ---- orders ----


def places(order, seed=0):
    taken, following = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernel("take_places")((2,), (64,), (taken, following), order=order, seed=seed)
    assert sorted(taken.tolist()) == list(range(128))
    return taken.tolist()


def test_orders():
    assert places(0) == list(range(128))
    assert places(1) == list(reversed(range(128)))
    assert places(2, 1) == places(2, 1) != places(2, 2)
    assert places(2, 1) not in (places(0), places(1))


# ---- arguments and shapes ----


@pytest.mark.parametrize("scalar", [3, 3.0, np.float32(3), np.int64(3), True])
def test_scalars_must_have_the_type_of_the_parameter(scalar):
    x = torch.zeros(4)
    with pytest.raises(TypeError, match="argument 2 is .*, the kernel wants int32"):
        kernel("copy_strided")((1,), (4,), (x, x, scalar, np.int64(1), np.int64(1)))


def test_other_wrong_arguments():
    x, four, one = torch.zeros(4), np.int32(4), np.int64(1)
    run = kernel("copy_strided")
    with pytest.raises(TypeError, match="takes 5 arguments, not 4"):
        run((1,), (4,), (x, x, four, one))
    with pytest.raises(TypeError, match="argument 0 is float, the kernel wants a pointer"):
        run((1,), (4,), (1.0, x, four, one, one))
    with pytest.raises(TypeError, match="argument 1 is a tensor on meta"):
        run((1,), (4,), (x, x.to("meta"), four, one, one))


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("as_argument", [lambda x: x, lambda x: np.uint64(x.data_ptr()), lambda x: x.numpy()])
def test_views_of_one_storage_and_addresses(check, as_argument):
    table = torch.arange(24.0).reshape(4, 6)
    before = table.clone()
    x, y = table[:, 1], table.t()[4]
    arguments = (as_argument(x), as_argument(y), np.int32(4), np.int64(6), np.int64(6))
    with watch(table):
        kernel("copy_strided", check=check)((1,), (32,), arguments)
    before[:, 4] = before[:, 1]
    assert torch.equal(table, before)


def test_addresses_are_those_of_living_tensors():
    run, y = kernel("copy_strided", check=True), torch.zeros(4)
    arguments = (np.int32(4), np.int64(1), np.int64(1))
    x = torch.ones(4)
    run((1,), (32,), (np.uint64(x.data_ptr()), np.uint64(y.data_ptr()), *arguments))  # without watch
    assert (y == 1).all()
    with pytest.raises(KernelFault, match="argument 0: the address 0x40 belongs to no living tensor"):
        run((1,), (32,), (np.uint64(64), y, *arguments))


def test_shapes_that_a_gpu_refuses():
    x, one = torch.zeros(4), np.int32(1)
    product, arguments = kernel("matrix_product"), (x, x, x, one, one, one)
    with pytest.raises(KernelFault, match="a block of 65 threads, launch bounds allow 64"):
        product((1,), (65,), arguments)
    with pytest.raises(KernelFault, match=r"a grid of \(0,\)"):
        product((0,), (64,), arguments)
    with pytest.raises(KernelFault, match=r"a block of \(1, 1, 65\)"):
        product((1,), (1, 1, 65), arguments)
    with pytest.raises(KernelFault, match="50000 bytes of dynamic shared memory, .* allows 49152"):
        product((1,), (8, 8), arguments, shared_mem=50000)
    product.max_dynamic_shared_size_bytes = 50000
    product((1,), (8, 8), arguments, shared_mem=50000)


# ---- settings ----


def test_running_changes_the_defaults_and_lists_the_launches():
    with running(check=True, order=2, seed=5) as launches:
        assert (settings.check, settings.count, settings.order, settings.seed) == (True, False, 2, 5)
        with running(order=1) as inner:
            assert (settings.check, settings.order, settings.seed) == (True, 1, 5)
            matrix_product()
        with pytest.raises(KernelFault, match="race"):
            matrix_product("BUG_READ_TOO_EARLY")
    assert settings == cuda_executor.Settings()
    assert [launch.name for launch in launches] == ["matrix_product"] * 2
    assert len(inner) == 1 and inner[0] == launches[0]
    assert (inner[0].grid, inner[0].block, inner[0].shared_mem) == ((2, 2), (8, 8), 512)
    assert inner[0].traffic.written_bytes == 13 * 10 * 4


def test_the_order_of_the_settings_is_used():
    with running(order=1):
        assert places(None) == places(1)
    with running(order=2, seed=3):
        assert places(None, None) == places(2, 3)


# ---- traffic ----


@pytest.mark.parametrize("mode", ["count", "check"])
def test_traffic_of_a_matrix_product(mode):
    with running(**{mode: True}):
        traffic = matrix_product(m=16, k=24, n=8).last_traffic
    blocks, tiles = 2, 3
    assert traffic.read_bytes == traffic.read_per_block == blocks * tiles * 2 * 64 * 4
    assert traffic.written_bytes == traffic.written_per_block == 16 * 8 * 4
    assert traffic.shared_accesses == blocks * tiles * 64 * (2 + 2 * 8)
    assert traffic.shared_bytes == 4 * traffic.shared_accesses
    assert traffic.barriers == blocks * tiles * 2
    assert [buffer.arguments for buffer in traffic.buffers] == [(0,), (1,), (2,)]
    assert [buffer.read_bytes for buffer in traffic.buffers] == [1536, 1536, 0]
    assert [buffer.written_bytes for buffer in traffic.buffers] == [0, 0, 512]


def test_traffic_of_repeated_accesses():
    x, y = torch.randn(8), torch.zeros(96)
    flags, counter = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    with running(count=True):
        run = kernel("traffic")
        run((3,), (32,), (x, y, flags, counter))
    assert (flags.item(), counter.item()) == (1, 3)
    of_x, of_y, of_flags, of_counter = run.last_traffic.buffers
    assert (of_x.read_bytes, of_x.read_per_block) == (3 * 32 * 2 * 4, 3 * 5 * 4)
    assert (of_y.written_bytes, of_y.written_per_block) == (3 * 32 * 2 * 4, 3 * 32 * 4)
    assert (of_flags.written_bytes, of_flags.written_per_block) == (3 * 8, 3)
    assert (of_counter.read_bytes, of_counter.written_bytes) == (3 * 4, 3 * 4)
    assert run.last_traffic.shared_bytes == 3 * 32 * (16 + 4)
    assert run.last_traffic.barriers == 3


def test_nothing_is_counted_when_not_asked_for():
    with running() as launches:
        run = matrix_product()
    assert run.last_traffic is None
    assert launches[0].traffic is None


# ---- what cannot be built ----


def test_an_error_in_the_source_is_shown_with_its_line():
    with pytest.raises(RuntimeError, match=r"wrong\.cu:2:\d+: error: .*missing"):
        RawModule('extern "C" __global__ void f() {\n  missing(); }', name="wrong.cu").get_function("f")


def test_only_kernels_of_this_configuration_are_there():
    code = (
        '#ifdef OTHER\nextern "C" __global__ void other() {}\n#endif\nextern "C" __global__ void one() {}\n'
    )
    RawModule(code).get_function("one")
    with pytest.raises(ValueError, match="no .* function other in the source"):
        RawModule(code).get_function("other")
    RawModule(code, ("--std=c++17", "-DOTHER")).get_function("other")


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setattr(cuda_executor, "CXX", "no-such-compiler")
    with pytest.raises(
        RuntimeError, match=re.escape("no-such-compiler is needed to run CUDA kernels on the CPU")
    ):
        kernel("traffic")
