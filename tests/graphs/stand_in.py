"""A recording stand-in for CUDA graphs, on a CPU, and the small models that tests run with it.

It keeps the promises that CUDA graphs make and the ones that they don't:
- capturing computes nothing: results have garbage until the first replay, inputs are as they were;
- a replay reads and writes the memory of the capture, whatever tensors live in it now: the stand-in holds aliases of
  the memory, so a tensor that moved is read where it was, stale;
- results of a replay are overwritten by the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpfuse import graphs

SIZES = (4, 8, 16)
LIBRARY = torch.library.Library("graphs_test", "DEF")
LIBRARY.define("pair(Tensor x) -> (Tensor, Tensor)")
LIBRARY.impl("pair", lambda x: (x * 2, x + 1), "CompositeExplicitAutograd")
torch.library.register_fake("graphs_test::pair", lambda x: (x * 2, x + 1), lib=LIBRARY)
LIBRARY.define("square_(Tensor(a!) x, SymInt n) -> ()")
LIBRARY.impl("square_", lambda x, n: _square(x, n), "CompositeExplicitAutograd")
torch.library.register_fake("graphs_test::square_", lambda x, n: None, lib=LIBRARY)
SEEN: list[tuple[int, ...]] = []  # the shapes that split operators got


def _square(x: Tensor, n: int) -> None:
    SEEN.append((*x.shape, n))
    x.square_()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Every test of a module that imports this begins with nothing compiled, a known seed, and without gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    SEEN.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def writes(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Recorded:
    """A call that was recorded: which callable, on which memory."""

    def __init__(self, run: Callable[..., Any], inputs: Sequence[Any]) -> None:
        self.run = run
        self.inputs = [i.detach() if isinstance(i, Tensor) else i for i in inputs]
        self.replays = 0
        self.alive = True
        kept = [(i, i.clone(), writes(i)) for i in tensors_of(self.inputs)]
        self.returned = run(*inputs)
        for tensor, copy, before in kept:
            if writes(tensor) != before or tensor.is_inference():
                tensor.copy_(copy)
        mine = {i.untyped_storage().data_ptr() for i in tensors_of(self.inputs)}
        for result in tensors_of(self.returned):
            if result.untyped_storage().data_ptr() not in mine:
                result.fill_(torch.nan if result.is_floating_point() else 77)
        self.outputs = [o.detach() for o in tensors_of(self.returned)]

    def replay(self) -> None:
        assert self.alive, "a graph was replayed after its reset"
        self.replays += 1
        for memory, value in zip(self.outputs, tensors_of(self.run(*self.inputs)), strict=True):
            memory.copy_(value)

    def reset(self) -> None:
        self.alive = False


class StandIn:
    """A Mechanism. `stream` says what calls come on; `fail` is called before each capture."""

    name = "recording stand-in"

    def __init__(self) -> None:
        self.recorded: list[Recorded] = []
        self.pools: list[Any] = []
        self.stream: Hashable = "main"
        self.made = 0
        self.log: list[str] = []
        self.fail: Callable[[], None] = lambda: None

    def why_not(self, device: torch.device) -> str:
        return ""

    def lane(self) -> Hashable:
        return self.stream

    def aside(self, lane: Hashable) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def new_pool(self) -> Any:
        self.made += 1
        return self.made

    def capture(self, run: Callable[..., Any], inputs: Sequence[Any], pool: Any, lane: Hashable) -> tuple[Any, Any]:
        self.fail()
        graph = Recorded(run, inputs)
        self.recorded.append(graph)
        self.pools.append(pool)
        return graph, graph.returned

    def unowned(self, tensor: Tensor) -> Tensor:
        return tensor.detach()

    def held(self, pool: Any) -> int:
        graphs_ = [g for g, p in zip(self.recorded, self.pools, strict=True) if p == pool and g.alive]
        return sum(o.nbytes for g in graphs_ for o in g.outputs)

    def wait(self) -> None:
        self.log.append("wait")

    def give_back(self) -> None:
        self.log.append("give back")


class Block(nn.Module):
    """Projections, rotation-like scaling by position, attention behind the boundary, a residual updated in place."""

    def __init__(self, width: int = 16, heads: int = 2, core: graphs.boundary.Core | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attend = graphs.attention("block", core)

    def forward(self, x: Tensor, residual: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q * (1 + 0.01 * positions[:, None]), k, v))
        y = self.out(self.attend(q, k, v).flatten(-2))
        residual += y
        return torch.nn.functional.rms_norm(residual, residual.shape[-1:]), residual


class Model(nn.Module):
    """Token ids `[T]` and positions `[T]` to hidden states `[T, width]`."""

    def __init__(self, layers: int = 3, width: int = 16, core: graphs.boundary.Core | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(Block(width, core=core) for _ in range(layers))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids)
        residual = x.clone()
        for layer in self.layers:
            x, residual = layer(x, residual, positions)
        return x


def batch(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 32, (tokens,), generator=generator), torch.arange(tokens)


def make(*, split_ops: Any = ("tpfuse::attention",), **settings: Any) -> tuple[graphs.Piecewise, StandIn]:
    stand_in = StandIn()
    return graphs.Piecewise(split_ops, SIZES, mechanism=stand_in, **settings), stand_in


def compiled(model: Callable[..., Any], backend: graphs.Piecewise) -> Callable[..., Any]:
    step = torch.compile(model, backend=backend, fullgraph=True)

    def marked(*inputs: Tensor) -> Any:
        for tensor in inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return step(*inputs)

    return marked


def rows(tokens: int, width: int = 8) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))


def equal(given: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
