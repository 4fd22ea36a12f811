"""The requests of `tpfuse bench model` on one rank: prompt and decode, by the model's own forward or in packed batches.

`Session` decodes with transformers' static cache, a step eagerly or as one CUDA graph, as it is or compiled first.
`PackedSession` runs chunks of the prompts and decode steps through `piecewise`, and times single chunks beside eager
ones.

A step that is compiled is one graph of Dynamo's, in every mode: inputs, forward, argmax and the next position. Shapes
are numbers, and Inductor's own CUDA graphs are off, since ours are around it. Ranks go on together once all have
compiled: a kernel that waits for the others would otherwise wait for their compilers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpfuse.bench.method import first_error
from tpfuse.errors import InvalidArgument, Unsupported, first_line
from tpfuse.graphs import CudaGraphs
from tpfuse.integrations.transformers.packed import PackedModel, piecewise

SPARE = 8  # positions of the cache beyond the workload: for the steps before the timed runs
GRAPHS = ("none", "full", "piecewise")
COMPILERS = ("", "inductor")  # empty: a decode step is not compiled, and pieces run as torch.compile traced them
SIZES = (64, 128, 256, 512)  # numbers of tokens that piecewise captures, beside that of a decode step
CHUNK_RUNS = 20


@dataclass(frozen=True)
class Captured:
    """What capturing so many tokens took: seconds, and bytes of the pool."""

    tokens: int
    graphs: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Workload:
    """What each mode is measured on."""

    concurrency: tuple[int, ...] = (1, 10, 64)
    input_len: int = 2048
    output_len: int = 256
    graphs: str = "full"  # of GRAPHS: eager, decode steps in one CUDA graph each, or prompt and decode in pieces
    chunks: tuple[int, ...] = ()  # with piecewise: time single prefill chunks of so many tokens
    compiler: str = ""  # of COMPILERS: what makes code of decode steps, or of pieces and the chunks beside them
    experts: str = ""  # transformers' implementation of the experts; empty: its default
    profile: str = ""  # a file to which rank 0 appends where the time of a decode step goes, a JSON line a kernel

    def check(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1 or self.input_len < 1 or self.output_len < 2:
            raise InvalidArgument(
                f"bench model: {list(self.concurrency)} requests of {self.input_len} in, {self.output_len} out; "
                "needed: at least one request, one token in and two out."
            )
        if self.graphs not in GRAPHS:
            raise InvalidArgument(f"bench model: graphs={self.graphs!r}; supported: {', '.join(GRAPHS)}.")
        if self.compiler not in COMPILERS or (self.compiler and self.graphs == "none"):
            raise InvalidArgument(
                f"bench model: compiler={self.compiler!r}, graphs={self.graphs!r}; with full or piecewise: 'inductor'."
            )
        fits = all(2 <= chunk <= self.input_len for chunk in self.chunks)
        if self.chunks and (self.graphs != "piecewise" or not fits):
            raise InvalidArgument(
                f"bench model: chunks {list(self.chunks)}, {self.input_len} in, graphs={self.graphs!r}; needed: at "
                "least 2 tokens, no more than a prompt has, and graphs=piecewise, which times them eagerly, too."
            )


class Session:
    """Requests of one length that are served together: a static cache, and tensors that a CUDA graph can keep."""

    def __init__(self, model: Any, batch: int, workload: Workload, device: torch.device) -> None:
        from transformers import StaticCache

        self.model, self.workload, self.device = model, workload, device
        self.length = workload.input_len + workload.output_len + SPARE
        config = model.config.get_text_config(decoder=True)
        self.hybrid = "linear_attention" in (getattr(config, "layer_types", None) or ())
        self.cache = StaticCache(config=config, max_cache_len=self.length)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(config.vocab_size, (batch, workload.input_len), generator=generator)
        self.prompt = prompt.to(device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.places = torch.arange(self.length, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: tuple[Captured, ...] = ()
        self._step: Callable[[], None] = self._advance
        if workload.compiler and workload.graphs == "full":
            self._step = _compiled(self._advance, workload.compiler)

    def start(self) -> None:
        """The prompt: fills the cache and gives the first token."""
        self.cache.reset()
        self.position.fill_(self.workload.input_len)
        positions = self.places[: self.workload.input_len].unsqueeze(0)
        output = self.model(
            input_ids=self.prompt, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self._take(output.logits)

    def step(self) -> None:
        """One token for every request."""
        self._step()

    def _advance(self) -> None:
        output = self.model(**self._inputs(), logits_to_keep=1)
        self._take(output.logits)
        self.position.add_(1)

    def _inputs(self) -> dict[str, Any]:
        visible: Any = (self.places <= self.position)[:, None, None, :]
        if self.hybrid:
            visible = {"full_attention": visible, "linear_attention": None}
        return {
            "input_ids": self.tokens,
            "attention_mask": visible,
            "position_ids": self.position,
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def _take(self, logits: Tensor) -> None:
        self.tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def collectives(self) -> int:
        """Collectives in the layers during one decode step, an eager one."""
        applied = getattr(self.model, "_tpfuse", None)
        before = served(applied)
        with CountCollectives() as counted:
            self.model.base_model(**self._inputs())
        self.position.add_(1)
        return served(applied) - before if applied else counted.found

    def capture(self) -> None:
        """A decode step as a CUDA graph. What compiling it takes counts."""
        began = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL's watchdog queries events
            self.step()
        seconds, held = time.perf_counter() - began, CudaGraphs().held(self.graph.pool())
        self.captured = (Captured(len(self.tokens), 1, seconds, held),)

    def close(self) -> None:
        """Give back what was captured."""
        self.graph = None

    def timed(self) -> tuple[float, float]:
        """Seconds to the first token, and to the last."""
        advance = self.graph.replay if self.graph else self.step
        self._together()
        began = time.perf_counter()
        self.start()
        self._wait()
        first = time.perf_counter()
        for _ in range(self.workload.output_len - 1):
            advance()
        self._wait()
        return first - began, time.perf_counter() - began

    def profiled(self) -> list[dict[str, Any]]:
        """Time on the device by kernel (on a CPU by operator), a decode step, longest first."""
        advance = self.graph.replay if self.graph else self.step
        cuda, steps = self.device.type == "cuda", min(10, self.workload.output_len - 1)
        self.start()
        self._together()
        kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
        with torch.profiler.profile(activities=[kind], schedule=schedule) as found:
            advance()  # not counted: in it ranks wait for those whose profilers took longer to start
            self._together()
            found.step()
            for _ in range(steps):
                advance()
            self._wait()
        rows = []
        for event in found.key_averages():
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            rows.append({"kernel": event.key, "calls": event.count / steps, "us": us / steps})
        return sorted((row for row in rows if row["us"]), key=lambda row: -row["us"])

    def _together(self) -> None:
        self._wait()
        if dist.get_world_size() > 1:
            slowest([0.0], self.device)
        self._wait()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class PackedSession(Session):
    """The same requests in packed batches through piecewise graphs: prompts in chunks of the largest size, one request
    after the other, and decode steps of all requests."""

    def __init__(self, model: Any, batch: int, workload: Workload, device: torch.device) -> None:
        super().__init__(model, batch, workload, device)
        torch._dynamo.reset()  # what was compiled for the session before
        sizes = sorted(size for size in {batch, *SIZES, *workload.chunks} if size <= batch * self.length)
        self.packed = piecewise(model, sizes, slots=batch, length=self.length, compiler=_compiler(workload.compiler))
        self.packed.capture()
        self.captured = tuple(
            Captured(size.size, size.graphs, size.seconds, size.bytes)
            for size in self.packed.report().sizes
            if size.graphs
        )

    def start(self) -> None:
        for slot, prompt in enumerate(self.prompt):
            self.tokens[slot] = self._prefill(self.packed, slot, prompt).argmax()

    def step(self) -> None:
        self.tokens.copy_(self.packed.step(dict(enumerate(self.tokens))).argmax(-1, keepdim=True))

    def collectives(self) -> int:
        """Of an eager step: replays of graphs are not counted."""
        applied = getattr(self.model, "_tpfuse", None)
        before = served(applied)
        PackedModel(self.model, slots=1, length=1).step({0: self.tokens[0]})
        return served(applied) - before

    def chunk_seconds(self) -> dict[str, dict[str, float]]:
        """By how it runs and by tokens, the time of one prefill chunk, the last of a prompt: eagerly, through
        torch.compile without graphs (the same trace and compiler as the pieces'), and in piecewise graphs."""
        compiled = self.workload.compiler or "eager"  # torch's name for a backend that runs what was traced
        ways: dict[str, Callable[[], PackedModel]] = {
            "eager": lambda: PackedModel(self.model, slots=1, length=self.length),
            "compiled": lambda: PackedModel(self.model, slots=1, length=self.length, backend=compiled),
            "piecewise": lambda: self.packed,
        }
        return {
            way: {str(chunk): self._chunk(packed, chunk) for chunk in self.workload.chunks}
            for way, packed in ((way, make()) for way, make in ways.items() if self.workload.chunks)
        }

    def close(self) -> None:
        self.packed.clear()

    def _prefill(self, packed: PackedModel, slot: int, prompt: Tensor) -> Tensor:
        """A prompt in chunks. Returns the logits behind it."""
        packed.free(slot)
        for chunk in prompt.split(self.packed.backend.sizes[0]):
            logits = packed.step({slot: chunk})
        return logits[0]

    def _chunk(self, packed: PackedModel, tokens: int) -> float:
        prompt = self.prompt[0]
        self._prefill(packed, 0, prompt)
        seconds = []
        for _ in range(3 + CHUNK_RUNS):
            packed.free(0, keep=len(prompt) - tokens)
            self._together()
            began = time.perf_counter()
            packed.step({0: prompt[-tokens:]}).argmax(-1)
            self._wait()
            seconds.append(time.perf_counter() - began)
        return slowest([median(seconds[3:])], self.device)[0]


def _compiler(name: str) -> Any:
    return torch._dynamo.lookup_backend(name) if name else None


def _compiled(step: Callable[[], None], compiler: str) -> Callable[[], None]:
    from torch._dynamo.exc import BackendCompilerFailed

    torch._dynamo.reset()  # what was compiled for the session before
    advance = torch.compile(step, backend=_in_step(_compiler(compiler)), fullgraph=True, dynamic=False)

    def run() -> None:
        try:
            advance()
        except BackendCompilerFailed as error:
            raise error.inner_exception from None  # which says in its first line what is wrong

    return run


def _in_step(compiler: Any) -> Callable[..., Any]:
    """The compiler, but no rank returns from it before all do. If one could not, none does."""

    def compiled(graph: Any, inputs: list[Any]) -> Any:
        made, error = None, ""
        try:
            made = compiler(graph, inputs)
        except Exception as raised:
            error = first_line(raised)
        if error := first_error(error):
            raise Unsupported(f"bench model: a decode step does not compile: {error}")
        return made

    return compiled


class CountCollectives(TorchDispatchMode):
    """Counts what goes through torch.distributed, DTensors' included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func.name()).partition("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_")):
            self.found += 1
        return func(*args, **(kwargs or {}))


def slowest(seconds: Sequence[float], device: torch.device) -> list[float]:
    """The maximum over ranks of each figure."""
    figures = torch.tensor(seconds, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    return [float(figure) for figure in figures]


def served(applied: Any) -> int:
    """Collectives that tpfuse has done for a model."""
    return sum(counter.calls for counter in applied.report().counters) if applied else 0
