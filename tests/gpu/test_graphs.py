"""Piecewise CUDA graphs on real GPUs: equal to eager on, between and beyond the captured sizes; cleared and captured
again; memory given back; usable after a failed capture; with tpfuse's operators on several ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

from tpfuse import Communicator, graphs
from tpfuse.launch import Rank, Ranks

SIZES = (8, 32, 64)
TOKENS = (64, 8, 32, 1, 0, 5, 33, 63, 65, 100, 9, 64, 0)
LIBRARY = torch.library.Library("graphs_gpu_test", "DEF")
LIBRARY.define("look(Tensor x) -> Tensor")
LIBRARY.impl("look", lambda x: x * float(x.sum().isfinite().item()), "CompositeExplicitAutograd")  # asks the GPU
torch.library.register_fake("graphs_gpu_test::look", torch.empty_like, lib=LIBRARY)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attend = graphs.attention("block")

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (-1, 64)) for part in self.qkv(x).chunk(3, -1))
        residual += self.out(self.attend(q, k, v).flatten(-2))
        return torch.nn.functional.rms_norm(residual, residual.shape[-1:]), residual


class Model(nn.Module):
    """`[T, width]` to `[T, width]`, with a cache of `[width]` that its pieces read."""

    def __init__(self, layers: int = 3, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.register_buffer("cache", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        residual = x * self.cache
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x + self.cache


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    gc.collect()


def rows(tokens: int, width: int = 256) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator("cuda").manual_seed(tokens), device="cuda")


def make(model: Callable[..., Any], **settings: Any) -> tuple[graphs.Piecewise, Callable[[Tensor], Tensor]]:
    backend = graphs.Piecewise(["tpfuse::attention"], SIZES, **settings)
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def step(x: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(x)

    return backend, step


def capture(backend: graphs.Piecewise, step: Callable[[Tensor], Tensor], width: int = 256) -> None:
    backend.capture(lambda tokens: step(rows(tokens, width)), progress=False)


def equal(given: Tensor, wanted: Tensor) -> None:
    """Other sizes are other GEMM kernels, so this is not bitwise; float32, so it is close."""
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("first", ["captured", "lazily"])
@pytest.mark.parametrize("compiler", [None, compile_fx], ids=["as traced", "Inductor"])
def test_equal_to_eager(first: str, compiler: Any) -> None:
    model = Model().cuda()
    backend, step = make(model, compiler=compiler)
    if first == "captured":
        capture(backend, step)
    kept = [(step(rows(tokens)), tokens) for tokens in TOKENS]
    for given, tokens in kept:  # after all of them: results are the caller's own
        equal(given, model(rows(tokens)))
    report = backend.report()
    assert report.mechanism == "CUDA graphs"
    assert report.graphs == 3 * 4
    assert report.misses == {65: 1, 100: 1}
    assert report.failures == ()
    if first == "captured":
        # Inductor's code for many tokens guards against 0 and 1, so torch compiles these for themselves.
        alone = 3 if compiler else 0
        assert report.eager == ({"compiled for constant shapes: 0 or 1 tokens, or none marked": alone} if alone else {})
        assert report.replays == len(TOKENS) - 2 - alone


@pytest.mark.gpu
def test_bitwise_where_rows_do_not_depend_on_others() -> None:
    def model(x: Tensor) -> Tensor:
        y = torch.nn.functional.rms_norm(torch.relu(x) * 3, x.shape[-1:])
        z = torch.ops.graphs_gpu_test.look(y)
        return z * 2 + y

    backend = graphs.Piecewise(["graphs_gpu_test::look"], SIZES)
    step = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in (64, 5, 9, 33, 8):
        x = rows(tokens)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(step(x), model(x))
    assert backend.report().graphs == 6


@pytest.mark.gpu
def test_clear_and_capture_again_with_moved_buffers() -> None:
    model = Model().cuda()
    backend, step = make(model)
    with backend.estimate() as estimate:
        capture(backend, step)
        equal(step(rows(20)), model(rows(20)))
        model.cache = model.cache * 3
        with pytest.raises(graphs.StaleGraph, match="cache"):
            step(rows(20))
    assert estimate.bytes > 0
    for factor in (2.0, 5.0):
        model.cache = torch.full_like(model.cache, factor)
        backend.clear()
        capture(backend, step)
        for tokens in TOKENS:
            equal(step(rows(tokens)), model(rows(tokens)))


@pytest.mark.gpu
def test_memory_is_given_back() -> None:
    model = Model(layers=4, width=1024).cuda()
    backend, step = make(model)
    capture(backend, step, 1024)  # once, so that libraries have what they keep
    backend.clear()
    held = []
    for _ in range(3):
        before = torch.cuda.memory_reserved()
        capture(backend, step, 1024)
        report, pool = backend.report(), backend.pool
        assert report.pool_bytes > 0
        backend.clear()
        segments = torch.cuda.memory_snapshot()
        assert not [s for s in segments if tuple(s["segment_pool_id"]) == tuple(pool)]
        held.append(torch.cuda.memory_reserved() - before)
    assert held[1:] == [0, 0]


@pytest.mark.gpu
def test_memory_does_not_grow_with_layers() -> None:
    bytes_of = {}
    for layers in (2, 16):
        backend, step = make(Model(layers, width=1024).cuda())
        capture(backend, step, 1024)
        bytes_of[layers] = backend.report().pool_bytes
        backend.clear()
    assert bytes_of[16] <= 2 * bytes_of[2]


@pytest.mark.gpu
def test_a_failed_capture_leaves_everything_usable() -> None:
    def wrong(x: Tensor) -> Tensor:
        return torch.ops.graphs_gpu_test.look(x * 2) + 1

    backend, step = make(wrong)
    for _ in range(2):
        with pytest.raises(graphs.CaptureFailed, match="be captured at 8 tokens"):
            step(rows(5))
    assert torch.cuda.is_current_stream_capturing() is False
    torch.cuda.synchronize()
    model = Model().cuda()
    other, good = make(model, pool=backend.pool)
    for tokens in TOKENS:
        equal(good(rows(tokens)), model(rows(tokens)))
    assert other.report().graphs == 12
    pool = other.pool
    assert other.clear().failures == ()
    assert not [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(pool)]


@pytest.mark.gpu
def test_two_models_in_one_process() -> None:
    pairs = []
    for layers in (1, 3):
        model = Model(layers).cuda()
        backend, step = make(model)
        capture(backend, step)
        pairs.append((model, backend, step))
    for tokens in TOKENS:
        for model, _, step in pairs:
            equal(step(rows(tokens)), model(rows(tokens)))
    pairs[0][1].clear()
    for tokens in TOKENS:
        for model, _, step in pairs:
            equal(step(rows(tokens)), model(rows(tokens)))


@pytest.mark.gpu
def test_streams_have_graphs_of_their_own_and_run_side_by_side() -> None:
    model = Model().cuda()
    backend, step = make(model)
    step(rows(16))
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        results = []
        for stream, tokens in zip(streams, (20, 30), strict=True):
            x = rows(tokens)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append((step(x), tokens, x))
        torch.cuda.synchronize()
        for given, tokens, _ in results:
            equal(given, model(rows(tokens)))
    assert backend.report().sizes[1].captures == 3


@pytest.mark.gpu
def test_inside_a_capture_of_the_callers() -> None:
    """A full graph of a decode step has the pieces in it, and no graphs of ours."""
    model = Model().cuda()
    backend, step = make(model)
    x = rows(8)
    wanted = step(x).clone()
    whole = torch.cuda.CUDAGraph()
    with torch.cuda.graph(whole):
        given = step(x)
    given.zero_()
    whole.replay()
    equal(given, wanted)
    assert backend.report().eager == {"inside a capture of the caller's: recorded into that": 1}


class Layer(nn.Module):
    """Sharded QK norm, attention, and the fused boundary of a decoder layer."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        self.comm, self.attend = comm, graphs.attention("layer")
        self.gamma = nn.Parameter(torch.rand(256, device="cuda") + 0.5)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.comm.qk_rms_norm(x * 2, x + 1, self.gamma, self.gamma)
        y = self.attend(*(t.unflatten(-1, (-1, 64)) for t in (q, k, x))).flatten(-2)
        norm, residual, _, _ = self.comm.all_reduce_rms_norm(y, self.gamma, residual=residual)
        return norm, residual


def ranks_job(rank: Rank) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.no_grad(), Communicator(max_hidden=1024) as comm:
        comm.prepare()
        model = Layer(comm)
        backend = graphs.Piecewise(["tpfuse::attention"], SIZES)
        compiled = torch.compile(model, backend=backend, fullgraph=True)

        def inputs(tokens: int) -> tuple[Tensor, Tensor]:
            x = rows(tokens) * 4.0**rank.rank
            residual = rows(tokens).flip(0).contiguous()
            for tensor in (x, residual):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            return x, residual

        backend.capture(lambda tokens: compiled(*inputs(tokens)), progress=False)
        worst = 0.0
        for phase in range(2):
            for tokens in TOKENS:
                for given, wanted in zip(compiled(*inputs(tokens)), model(*inputs(tokens)), strict=True):
                    if tokens:
                        worst = max(worst, float((given - wanted).abs().max()))
            if phase == 0:
                backend.clear()
        torch.cuda.synchronize()
        comm.prepare()  # raises if a kernel left a record
        return {"worst": worst, "report": backend.report().as_dict(), "mode": comm.report().effective_mode}


@pytest.mark.parametrize("world", [pytest.param(w, marks=pytest.mark.gpu(w)) for w in (2, 4)])
def test_tpfuse_operators_in_pieces_on_several_ranks(world: int) -> None:
    with Ranks(world, "cuda") as ranks:
        for result in ranks.run(ranks_job):
            assert result["worst"] <= 1e-5
            assert result["report"]["failures"] == ()
            assert result["report"]["misses"] == {65: 2, 100: 2}
