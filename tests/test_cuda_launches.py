"""What the cuda backend hands to its kernels, call after call, without a GPU: grid, stream and every argument.

What calls that are alike have in common is packed once: what differs between them are addresses, and whether these are
aligned.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tpfuse import Communicator, Rope, quant
from tpfuse.backends.cuda import all_reduce, sharded_norm
from tpfuse.backends.cuda.all_reduce import DEFAULTS, MAX_BLOCKS, AllReduce, ring_rows
from tpfuse.backends.cuda.all_reduce import why_not as why_not_reduce
from tpfuse.backends.cuda.backend import CudaBackend, routes
from tpfuse.backends.cuda.sharded_norm import ShardedNorm, why_not
from tpfuse.plan import Plan, slot_bytes

WORLD, STREAM = 4, 7
H200 = {"MULTIPROCESSOR_COUNT": 132, "COMPUTE_CAPABILITY_MAJOR": 9, "L2_CACHE_SIZE": 60 << 20}
BF16 = torch.bfloat16


class Launcher:
    """Stands in for launch.Launcher: keeps what it is given."""

    seen: list[tuple[Launcher, int, tuple[Any, ...]]]

    def __init__(self, name: str, layout: str, **_: object) -> None:
        self.name, self.layout = name, layout

    def __call__(self, grid: int, stream: int, *values: object) -> None:
        assert stream == STREAM
        struct.pack(self.layout, *values)
        addresses = [v for v in values if isinstance(v, int)]
        (shape,) = (v for v in values if isinstance(v, bytes))
        module = sharded_norm if "norm_by" in self.name else all_reduce
        Launcher.seen.append((self, grid, (*addresses, *module.SHAPE.unpack(shape))))


class Space:
    """Stands in for a workspace."""

    bases, error_pointer = (64, 128, 192, 256), 8


@pytest.fixture
def comm(alone: Communicator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """A communicator whose calls launch stand-ins for the kernels of rank 0 of 4."""
    for module in (sharded_norm, all_reduce):
        monkeypatch.setattr(module, "arch_of", lambda _: "sm_90a")
        monkeypatch.setattr(module, "attribute", lambda _, name: H200[name])
        monkeypatch.setattr(module, "compile_kernel", lambda _, name, arch: name)
        monkeypatch.setattr(module, "load", lambda made, _: made)
        monkeypatch.setattr(module, "Launcher", Launcher)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device, thresholds = torch.device("cuda", 0), DEFAULTS[WORLD]
    backend: Any = object.__new__(CudaBackend)
    backend.thresholds = thresholds
    backend._norm = ShardedNorm(device, 0, WORLD, Space(), 1.0)  # type: ignore[arg-type]
    backend._reduce = AllReduce(device, 0, WORLD, Space(), 1.0, thresholds)  # type: ignore[arg-type]
    monkeypatch.setattr(CudaBackend, "_current_stream", lambda _: STREAM)
    monkeypatch.setattr(CudaBackend, "check", lambda _: None)
    with Communicator(max_hidden=4096) as made:
        made._cuda, made.world = backend, WORLD
        made.plan = Plan("fused", "auto", WORLD, routes(thresholds))
        Launcher.seen = []
        yield made
        made._cuda = None


def launches(call: Callable[..., Any], *args: Any, **kw: Any) -> list[tuple[Launcher, int, tuple[Any, ...]]]:
    """What a call launches, made twice: the second time with what the first one has left."""
    Launcher.seen = []
    call(*args, **kw)
    first, Launcher.seen = Launcher.seen, []
    call(*args, **kw)
    assert [launcher for launcher, *_ in Launcher.seen] == [launcher for launcher, *_ in first]
    return Launcher.seen


def single(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def shifted(x: Tensor) -> Tensor:
    """x from an address on that is no multiple of 16 bytes, strides as they are."""
    space = torch.zeros(x.untyped_storage().nbytes() // x.element_size() + 1, dtype=x.dtype)
    return space.as_strided(x.shape, x.stride(), 1)


def test_arguments_of_a_qk_norm(comm: Communicator) -> None:
    wide = torch.zeros(5, 2048, dtype=BF16)
    q, k = wide[:, :1536], wide[:, 1536:1792]
    y, z = torch.zeros(5, 1544, dtype=BF16)[:, :1536], torch.zeros(5, 256, dtype=BF16)
    a, b = torch.ones(1536), torch.ones(256).to(BF16)
    rope = Rope(torch.zeros(9, 32), torch.zeros(9, 32), torch.zeros(5, dtype=torch.int64), 128, 64, interleaved=True)
    ((launcher, grid, values),) = launches(
        comm.qk_rms_norm, q, k, a, b, eps=(1e-5, 1e-6), weight_bias=1.0, rope=rope, out=(y, z)
    )
    assert "norm_by_row" in launcher.name
    assert "true" in launcher.name
    assert "neighbours" in launcher.name
    assert grid == 2
    tensors = (q, k, y, z, a, b, rope.cos, rope.sin, rope.positions)
    numbers = (single(1e-5), single(1e-6), 1.0 / 6144, 1.0 / 1024, 1.0)
    assert values == (
        *(t.data_ptr() for t in tensors), 2048, 2048, 1544, 256, 5, 1536, 256, 0, 1, *map(single, numbers), 128, 64,
        9, 1,
    )  # fmt: skip


def test_tables_that_32_bits_do_not_count_are_left_to_collective() -> None:
    for rows, served in ((1 << 29, True), ((1 << 29) + 1, False)):
        table = torch.empty(rows, 32, device="meta")
        rope = Rope(table, torch.empty(9, 32), torch.zeros(5, dtype=torch.int64), 128, 64)
        assert (why_not((512, 256), rope) == "") == served


def test_arguments_of_an_rms_norm(comm: Communicator) -> None:
    x, gamma, out = torch.zeros(3, 512), torch.ones(512).half(), torch.zeros(3, 512)
    ((launcher, _, values),) = launches(comm.rms_norm, x, gamma, eps=1e-5, out=out)
    at = [t.data_ptr() for t in (x, x, out, out, gamma, gamma)]
    assert values == (
        *at, 0, 0, 0, *[512] * 4, 3, 512, 512, 2, 2, *map(single, (1e-5, 1e-5, 1 / 2048, 1 / 2048, 0.0)), 1, 0,
        0, 1,
    )  # fmt: skip
    assert "norm_by_row<float, 4, 2, 0, true" in launcher.name


@pytest.mark.parametrize(
    ("rows", "dtype", "asks"),
    [(16, BF16, 1), (17, BF16, 0), (4096, BF16, 0), (8192, BF16, 1), (4096, torch.float32, 1)],
)
def test_rows_that_the_l2_has_are_not_asked_for(comm: Communicator, rows: int, dtype: torch.dtype, asks: int) -> None:
    """But for a few, see PREFETCH_ROWS: those of 14 MB and more than a third of 60 MB."""
    q, k = torch.zeros(rows, 1536, dtype=dtype), torch.zeros(rows, 256, dtype=dtype)
    ((_, _, values),) = launches(comm.qk_rms_norm, q, k, torch.ones(1536), torch.ones(256))
    assert values[-1] == asks


def test_arguments_of_outputs_of_experts(comm: Communicator) -> None:
    gamma, residual = torch.ones(64), torch.zeros(5, 64)
    apart = torch.zeros(5, 12, 72, dtype=BF16)[:, :8, :64]
    major = torch.zeros(8, 5, 64, dtype=BF16).transpose(0, 1)
    batch = torch.zeros(1, 5, 8, 64, dtype=BF16)
    for x, strides in ((apart, (864, 72)), (major, (64, 320)), (batch, (512, 64))):
        stream = residual.view(*x.shape[:-2], 64)
        ((launcher, grid, values),) = launches(comm.all_reduce_rms_norm, x, gamma, residual=stream, top_k=8)
        assert launcher.name.endswith(", 8>>")
        assert grid == 5
        assert values[0] == x.data_ptr()
        assert values[8:14] == (*strides, 64, 64, 5, 64)


def test_more_experts_than_a_kernel_sums_are_left_to_collective(comm: Communicator) -> None:
    for count, reason in ((32, ""), (33, "cuda kernels sum the outputs of up to 32 experts; given 33")):
        assert why_not_reduce(64, count) == reason
        y = comm.all_reduce_rms_norm(torch.zeros(2, count, 64), torch.ones(64), top_k=count)
        assert y.norm is not None
        assert len(Launcher.seen) == 1
    assert {counter.route.backend: counter.route.reason for counter in comm.report().counters} == {
        "cuda": "",
        "collective": reason,
    }


@pytest.mark.parametrize("own_rows", [False, True])
def test_arguments_of_every_launch_of_many_rows(comm: Communicator, own_rows: bool) -> None:
    """More rows than a launch may have: each begins at its own rows."""
    rows, width, step = 2 * MAX_BLOCKS + 100, 64, MAX_BLOCKS // WORLD * WORLD
    x, gamma = torch.zeros(rows, width).to(BF16), torch.ones(width)
    residual = torch.zeros((rows + 3) // WORLD if own_rows else rows, width)
    layout, fp8 = "row_sharded" if own_rows else "replicated", quant.FP8PerToken()
    results: list[Any] = []

    def call() -> None:
        results[:] = comm.all_reduce_rms_norm(
            x, gamma, residual=residual, quant=fp8, keep_norm=True, weight_bias=1.0, residual_layout=layout
        )

    made = launches(call)
    assert [grid for _, grid, _ in made] == [step, step, rows - 2 * step]
    norm, new, bytes_, scale = (t.data_ptr() for t in results)
    for i, (_, count, values) in enumerate(made):
        first, own = i * step, i * step // (WORLD if own_rows else 1)
        assert values == (
            x.data_ptr() + first * width * 2, norm + first * width * 2, residual.data_ptr() + own * width * 4,
            new + own * width * 4, gamma.data_ptr(), bytes_ + first * width, scale, 0,
            width, 0, width, width, count, width, 1, slot_bytes(width, 2), ring_rows(width, 2, WORLD, 1), first, rows,
            1, single(1e-6), 1 / 64, 1.0,
        )  # fmt: skip


def test_addresses_that_are_not_aligned_have_a_kernel_of_their_own(comm: Communicator) -> None:
    """With equal shapes and strides, so both are remembered as one; in any order, and for each address alone."""
    q, k, a, b = torch.zeros(5, 512).to(BF16), torch.zeros(5, 256).to(BF16), torch.ones(512), torch.ones(256)
    norm = {"q": q, "k": k, "q_weight": a, "k_weight": b}
    out = (torch.zeros(5, 512).to(BF16), torch.zeros(5, 256).to(BF16))
    reduce = {"x": q, "weight": a, "residual": torch.zeros(5, 512)}
    for method, arguments in ((comm.qk_rms_norm, norm), (comm.all_reduce_rms_norm, reduce)):
        ((aligned, *_),) = launches(method, **arguments)
        for name, value in arguments.items():
            ((unaligned, *_),) = launches(method, **{**arguments, name: shifted(value)})
            assert unaligned.name != aligned.name, name
            ((again, *_),) = launches(method, **arguments)
            assert again is aligned
    for outs in ((shifted(out[0]), out[1]), (out[0], shifted(out[1]))):
        ((first, *_),) = launches(comm.qk_rms_norm, **norm, out=out)
        ((second, *_),) = launches(comm.qk_rms_norm, **norm, out=outs)
        assert first.name != second.name


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("width", [1, 100, 1536, 3072, 4096])
@pytest.mark.parametrize("fp8", [None, quant.FP8PerToken()])
def test_the_report_names_the_algorithm_that_was_launched(
    comm: Communicator, width: int, dtype: torch.dtype, fp8: quant.Format | None
) -> None:
    """On both sides of the threshold, which is one of bytes: the plan and the launch decide alike."""
    last = (DEFAULTS[WORLD].one_shot_kib << 10) // slot_bytes(width, dtype.itemsize)
    above = "two-shot push" if fp8 is None else "two-shot push, norm before gather"
    x, gamma = torch.zeros(last + 1, width, dtype=dtype), torch.ones(width)
    for rows, kernel, algorithm in ((last, "one_shot", "one-shot push"), (last + 1, "two_shot", above)):
        comm._served.clear()
        comm._counters.clear()
        made = launches(comm.all_reduce_rms_norm, x[:rows], gamma, quant=fp8)
        assert {f"reduce_{kernel}<" in launcher.name for launcher, *_ in made} == {True}
        assert [c.route.algorithm for c in comm.report().counters] == [algorithm]


def test_the_kernels_address_rows_of_any_leading_dimensions(comm: Communicator) -> None:
    x, gamma = torch.zeros(2, 1, 3, 512).to(BF16), torch.ones(512)
    for given in (x, x.expand(2, 1, 3, 512), x[:, :, :, :256], x.transpose(0, 2), x[0, 0, 0]):
        ((_, _, values),) = launches(comm.rms_norm, given, gamma[: given.shape[-1]])
        rows, width = given.numel() // given.shape[-1], given.shape[-1]
        stride = 512 if given.dim() > 1 else width
        assert values[9:15] == (stride, stride, width, width, rows, width)


def test_bytes_are_counted_once_for_each_call(comm: Communicator) -> None:
    q, k, a, b = torch.zeros(5, 512).to(BF16), torch.zeros(5, 256).to(BF16), torch.ones(512), torch.ones(256)
    for _ in range(3):
        comm.qk_rms_norm(q, k, a, b)
        comm.all_reduce(q)
    counted = {c["op"]: (c["calls"], c["rows"], c["bytes"]) for c in comm.report().as_dict()["counters"]}
    assert counted == {"qk_rms_norm": (3, 15, 3 * 5 * 3 * 16), "all_reduce": (3, 15, 3 * 5 * 3 * 1024)}
