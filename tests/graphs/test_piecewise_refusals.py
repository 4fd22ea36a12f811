"""What a graph would compute otherwise than the model, or read where nothing is any more: Piecewise refuses it, or runs
it without graphs and says so. On a CPU, with the stand-in for CUDA graphs."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in import Block, Model, StandIn, batch, compiled, equal, fresh, make, rows  # noqa: F401  fresh: a fixture of all tests here
from torch import Tensor, nn
from torch.nn import functional

from tpfuse import graphs
from tpfuse.errors import InvalidArgument, Unsupported
from tpfuse.graphs import CudaGraphs

PAIR = ("graphs_test::pair",)


def pair(x: Tensor) -> Tensor:
    first: Tensor = torch.ops.graphs_test.pair(x)[0]
    return first


class Caching(nn.Module):
    """Writes its rows to a cache, inside of a piece."""

    def __init__(self, write: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(32, 8))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.cache, x)
        return pair(x) + 1


class TestNumbers:
    """Only what is made of the shapes of inputs is the number of tokens."""

    @pytest.mark.parametrize("numbers", [(3, 7, 11, 7), (0.5, 0.7, 0.9, 0.7)], ids=["int", "float"])
    def test_a_number_that_changes_is_served_without_graphs_and_counted(self, numbers: tuple[Any, ...]) -> None:
        backend, _ = make(split_ops=PAIR)

        def model(x: Tensor, number: Any) -> Tensor:
            return pair(x * number) + number

        step = torch.compile(model, backend=backend, fullgraph=True)
        for tokens, number in zip((5, 5, 6, 20), numbers, strict=True):
            x = rows(tokens)
            torch._dynamo.mark_dynamic(x, 0)
            equal(step(x, number), model(x, number))
        (reason,) = backend.report().eager
        assert reason.startswith("another number than at the capture: ")

    def test_a_number_that_is_none_is_one_number(self) -> None:
        backend, _ = make(split_ops=PAIR)
        step = torch.compile(lambda x, number: pair(x * number), backend=backend, fullgraph=True)
        for number in (1.0, float("nan"), float("nan"), float("nan")):
            x = rows(5)
            torch._dynamo.mark_dynamic(x, 0)
            step(x, number)
        assert backend.report().eager == {}

    def test_a_number_for_a_split_operator_is_the_one_of_the_call(self) -> None:
        seen = []

        def attend(x: Tensor, longest: int) -> Tensor:
            seen.append(longest)
            return x * 2

        torch._dynamo.allow_in_graph(attend)
        backend, _ = make(split_ops=[attend])
        step = torch.compile(lambda x, longest: attend(x + 1, longest) * 3, backend=backend, fullgraph=True)
        for tokens, longest in ((5, 100), (5, 200), (6, 300), (20, 400)):
            x = rows(tokens)
            torch._dynamo.mark_dynamic(x, 0)
            seen.clear()
            equal(step(x, longest), (x + 1) * 6)
            assert seen[-1] == longest

    def test_a_stride_is_no_number_of_tokens(self) -> None:
        backend, _ = make(split_ops=PAIR)

        def model(x: Tensor) -> Tensor:
            return pair(x * x.stride(0))

        for tokens, width in ((5, 16), (6, 24)):
            x = rows(tokens, width)[:, :8]
            equal(compiled(model, backend)(x), model(x))


class TestRowsOfOneToken:
    """Pieces treat each token for itself; padding is nobody's token."""

    @pytest.mark.parametrize(
        "mix",
        [
            lambda y: y[-1],
            lambda y: y.mean(0),
            lambda y: y / y.shape[0],
            lambda y: y * (y.shape[0] / 2),
            lambda y: y.mul_(y.shape[0]),
            lambda y: torch.divide(y, y.shape[0]),
            lambda y: y / torch.full((), y.shape[0]),
            lambda y: torch.add(y, y, alpha=y.shape[0]),
            lambda y: y.new_zeros(8).add_(y.sum(0)),
            lambda y: y.as_strided((y.shape[0], 4), (8, 1)),
        ],
        ids=[
            "the last row",
            "a mean",
            "by their number",
            "by a part of their number",
            "in place",
            "by another name",
            "by a tensor of it",
            "by a factor",
            "into a sum",
            "by strides",
        ],
    )
    def test_what_mixes_rows_is_refused(self, mix: Callable[[Tensor], Tensor]) -> None:
        backend, _ = make(split_ops=PAIR)
        with pytest.raises(InvalidArgument, match=r"(padding|padded buffer)"):
            compiled(lambda x: mix(pair(x) + 1), backend)(rows(5))

    def test_what_does_not_depend_on_rows_is_not(self) -> None:
        backend, _ = make(split_ops=PAIR)

        def model(x: Tensor) -> tuple[Tensor, Tensor]:
            rows_of_two = (
                torch.arange(x.shape[0]) + x.shape[0] * torch.arange(2)[:, None]
            )  # indices: experts have these
            y = torch.cat((x, x))[rows_of_two.flatten()][: x.shape[0]] * (x.numel() // x.shape[0])
            y = y * x.shape[1] + torch.zeros_like(x[0])
            return pair(y.reshape(x.shape[0], 2, 4).flatten(1)) * 2, x.new_ones(3) * 2

        for tokens in (8, 5, 20):
            for y, wanted in zip(compiled(model, backend)(rows(tokens)), model(rows(tokens)), strict=True):
                equal(y, wanted)

    def test_a_split_operator_that_returns_other_rows_than_its_fake_is_an_error(self) -> None:
        library = torch.library.Library("graphs_refused", "DEF")
        library.define("one_row(Tensor x) -> Tensor")
        library.impl("one_row", lambda x: x[:1] * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("graphs_refused::one_row", lambda x: x * 2, lib=library)
        backend, _ = make(split_ops=["graphs_refused::one_row"])
        with pytest.raises(InvalidArgument, match=r"returned \[1, 8\] .* says \[5, 8\]"):
            compiled(lambda x: torch.ops.graphs_refused.one_row(x) + 1, backend)(rows(5))


class TestWrites:
    @pytest.mark.parametrize(
        "write",
        [
            lambda cache, x: cache.index_copy_(0, torch.arange(x.shape[0]), x),
            lambda cache, x: cache[0].add_(1.0),
            lambda cache, x: cache.__setitem__(slice(0, 2), 1.0),
        ],
        ids=["a method", "through a view", "an assignment"],
    )
    @pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
    def test_a_piece_that_writes_a_cache_is_refused(self, write: Callable[..., Any], inference: bool) -> None:
        with torch.inference_mode(inference):
            backend, _ = make(split_ops=PAIR)
            model = Caching(write)
            with pytest.raises(InvalidArgument, match=r"writes to .*cache.*no dimension of tokens"):
                compiled(model, backend)(rows(5))

    def test_what_is_seen_in_the_graph_is_refused_before_it_happens(self) -> None:
        model = Caching(lambda cache, x: cache.add_(1.0))
        with pytest.raises(InvalidArgument, match="writes to"):
            compiled(model, make(split_ops=PAIR)[0])(rows(5))
        assert not model.cache.any()

    def test_a_write_is_not_lost_where_a_piece_gives_only_numbers_on(self) -> None:
        backend, _ = make(split_ops=["graphs_test::square_"])

        def model(x: Tensor) -> Tensor:
            x.add_(1)
            torch.ops.graphs_test.square_(x, x.shape[0] * 2)
            return x + 0

        for tokens in (5, 5, 8, 20):
            given, wanted = rows(tokens), rows(tokens)
            equal(compiled(model, backend)(given), model(wanted))
            equal(given, wanted)

    def test_inputs_that_share_memory_are_refused_if_one_is_written(self) -> None:
        def model(x: Tensor, part: Tensor) -> Tensor:
            x.add_(1)
            return pair(x) + part.sum(-1, keepdim=True)

        x = rows(5)
        with pytest.raises(InvalidArgument, match="shares memory with"):
            compiled(model, make(split_ops=PAIR)[0])(x, x[:, :4])

    def test_inputs_that_share_memory_are_not_if_none_is(self) -> None:
        x = rows(5)
        backend, _ = make(split_ops=PAIR)
        step = compiled(lambda x, part: pair(x) + part.sum(-1, keepdim=True), backend)
        for _ in range(2):
            equal(step(x, x[:, :4]), x * 2 + x[:, :4].sum(-1, keepdim=True))

    @pytest.mark.parametrize("cut", [lambda big: big.chunk(2, 1), lambda big: big[:, :8].chunk(2, 0)])
    def test_parts_of_one_tensor_that_do_not_overlap_are_served(self, cut: Callable[[Tensor], list[Tensor]]) -> None:
        def model(x: Tensor, other: Tensor) -> Tensor:
            x.add_(1)
            return pair(x) + other

        backend, _ = make(split_ops=PAIR)
        step = compiled(model, backend)
        for _ in range(2):
            given, wanted = rows(10, 16), rows(10, 16)
            equal(step(*cut(given)), model(*cut(wanted)))
            equal(given, wanted)

    def test_an_alias_that_only_a_split_operator_reads_is_refused_on_a_replay_too(self) -> None:
        def model(x: Tensor, other: Tensor) -> Tensor:
            x.add_(1)
            return pair(other) + x

        backend, _ = make(split_ops=PAIR)
        step = compiled(model, backend)
        step(rows(5), rows(5))
        x = rows(5)
        with pytest.raises(InvalidArgument, match="shares memory with"):
            step(x, x.view(5, 8))
        equal(x, rows(5))  # nothing has run

    def test_a_buffer_of_which_a_written_input_is_a_part_is_refused(self) -> None:
        model = Caching(lambda cache, x: None)

        def part(x: Tensor) -> Tensor:
            x.add_(1)
            return pair(x) + model.cache.sum()

        with pytest.raises(InvalidArgument, match=r"shares memory with .*cache"):
            compiled(part, make(split_ops=PAIR)[0])(model.cache[:5])

    @pytest.mark.parametrize("kind", ["conjugate", "negative"])
    def test_views_that_are_more_than_memory_are_read_as_such(self, kind: str) -> None:
        with torch.inference_mode():
            turned = torch.polar(torch.ones(8), torch.arange(8.0)).conj()
            model = nn.Module()
            model.register_buffer("turn", turned if kind == "conjugate" else turned.imag)
            step = compiled(lambda x: pair(x * model.turn.real * (model.turn * 2).imag.sum() if kind == "conjugate"
                                           else x * model.turn), make(split_ops=PAIR)[0])  # fmt: skip
            wanted = model.turn.resolve_conj().resolve_neg()
            factor = wanted.real * (wanted * 2).imag.sum() if kind == "conjugate" else wanted
            equal(step(rows(5)), rows(5) * factor * 2)


class TestNames:
    @pytest.mark.parametrize("op", ["aten::softmax", torch.softmax, torch.ops.aten.softmax, torch.Tensor.softmax])
    @pytest.mark.parametrize("model", [lambda x: (x * 2).softmax(0) * 3, lambda x: torch.softmax(x * 2, 0) * 3])
    def test_torchs_operators_are_meant_as_functions_and_methods(self, op: Any, model: Callable[..., Any]) -> None:
        backend, _ = make(split_ops=[op])
        for tokens in (5, 8):
            equal(compiled(model, backend)(rows(tokens)), model(rows(tokens)))
        report = backend.report()
        assert (report.split_calls, report.unseen) == (1, ())

    def test_an_operator_that_no_graph_has_is_reported(self) -> None:
        backend, _ = make(split_ops=["graphs_test::pair", "graphs_test::square_"])
        compiled(pair, backend)(rows(5))
        assert backend.report().unseen == ("graphs_test.square_",)

    def test_what_is_no_operator_is_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="split_ops has 3; needed"):
            make(split_ops=[3])

    @pytest.mark.parametrize("sizes", [None, 4, ["a", 4], [True], [4.5], []])
    def test_sizes_that_are_no_numbers_of_tokens_are_refused(self, sizes: Any) -> None:
        with pytest.raises(InvalidArgument, match="needed: one or more numbers of tokens"):
            graphs.Piecewise(PAIR, sizes, mechanism=StandIn())


class TestOwnership:
    def test_a_result_that_is_a_view_of_a_pieces_memory_is_a_copy(self) -> None:
        backend, _ = make(split_ops=[functional.dropout])
        step = compiled(lambda x: functional.dropout(x * 2, 0.5, training=False), backend)
        step(rows(5))
        first = step(rows(5))
        step(rows(6))
        equal(first, rows(5) * 2)

    def test_a_second_call_inside_of_one_is_an_error(self) -> None:
        model = Model(layers=1, core=lambda q, k, v, **_: step(*batch(5)) and None)
        step = compiled(model, make()[0])
        with pytest.raises(Unsupported, match="a call while another one"):
            step(*batch(5))

    def test_another_model_of_the_backend_inside_of_a_call_is_an_error(self) -> None:
        backend, _ = make()
        inner = compiled(Model(layers=1), backend)
        outer = compiled(Model(layers=1, core=lambda q, k, v, **_: inner(*batch(5)) and None), backend)
        with pytest.raises(Unsupported, match="a call while another one"):
            outer(*batch(5))

    def test_a_copy_of_a_compiled_model_is_served_by_the_same_backend(self) -> None:
        backend, _ = make()
        step = torch.compile(Model(layers=1), backend=backend)
        with torch._dynamo.config.patch(assume_static_by_default=False):
            wanted = step(*batch(5))
            equal(copy.deepcopy(step)(*batch(5)), wanted)

    def test_a_refused_call_keeps_nothing_of_its_inputs(self) -> None:
        step = compiled(lambda x: pair(x).mean(0), make(split_ops=PAIR)[0])
        x = rows(5)
        alive = weakref.ref(x)
        for _ in range(2):
            with pytest.raises(InvalidArgument, match="no dimension of tokens"):
                step(x)
        del x
        gc.collect()
        assert alive() is None

    def test_a_second_thread_on_the_stream_is_an_error(self) -> None:
        inside, go_on, errors = threading.Event(), threading.Event(), []

        def wait(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            inside.set()
            assert go_on.wait(60)
            return q

        backend, _ = make()
        step = compiled(Model(layers=1, core=wait), backend)
        go_on.set()
        step(*batch(5))  # compiled and captured
        inside.clear()
        go_on.clear()

        def first() -> None:
            with torch.no_grad():
                step(*batch(5))

        thread = threading.Thread(target=first)
        thread.start()
        try:
            assert inside.wait(60)
            for call in (lambda: step(*batch(5)), backend.clear):
                with pytest.raises(Unsupported) as raised:
                    call()
                errors.append(str(raised.value))
        finally:
            go_on.set()
            thread.join()
        assert "a call while another one" in errors[0]
        assert "clear() while a call runs" in errors[1]

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
    def test_a_copy_of_a_model_has_an_attention_of_its_own(self, copied: Callable[[Block], Block]) -> None:
        model = Block()
        other = copied(model)
        assert other.attend.name != model.attend.name
        del model
        x = rows(5, 16)
        assert other(x, x.clone(), torch.arange(5))[0].isfinite().all()


class TestLifeCycle:
    def test_a_cache_of_another_size_in_the_second_phase(self) -> None:
        """As an input, so that torch would make its size a dynamic one."""
        library = torch.library.Library("graphs_caches", "DEF")
        library.define("read(Tensor x, Tensor cache) -> Tensor")
        library.impl("read", lambda x, cache: x + cache[0], "CompositeExplicitAutograd")
        torch.library.register_fake("graphs_caches::read", lambda x, cache: x.clone(), lib=library)
        backend, _ = make(split_ops=["graphs_caches::read"])

        def model(x: Tensor, cache: Tensor) -> Tensor:
            return torch.ops.graphs_caches.read(x * 2, cache) + 1

        step = torch.compile(model, backend=backend, fullgraph=True)

        def run(tokens: int, cache: Tensor) -> None:
            x = rows(tokens)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_static(cache)
            equal(step(x, cache), model(x, cache))

        with backend.estimate():
            backend.capture(lambda tokens: run(tokens, torch.full((10, 8), 1.0)), progress=False)
        real = torch.full((100, 8), 2.0)
        backend.capture(lambda tokens: run(tokens, real), progress=False)
        run(5, real)

    def test_without_mark_static_the_error_says_so(self) -> None:
        backend, _ = make(split_ops=PAIR)
        step = torch.compile(lambda x, cache: pair(x) + cache[0], backend=backend)
        x = rows(5)
        torch._dynamo.mark_dynamic(x, 0)
        step(x, torch.ones(10, 8))
        with pytest.raises(InvalidArgument, match=r"a cache.*mark_static"):
            step(x, torch.ones(100, 8))

    def test_a_graph_behind_a_graph_break_finds_its_tokens(self) -> None:
        def model(x: Tensor) -> Tensor:
            y = pair(x) + 1
            torch._dynamo.graph_break()
            return pair(y) * 2

        backend, _ = make(split_ops=PAIR)
        step = torch.compile(model, backend=backend)
        for tokens in (5, 6, 20):
            x = rows(tokens)
            torch._dynamo.mark_dynamic(x, 0)
            equal(step(x), model(x))
        report = backend.report()
        assert (report.runners, report.eager, report.misses) == (2, {}, {20: 2})

    def test_a_step_that_runs_another_number_of_tokens_is_an_error(self) -> None:
        backend, _ = make()
        step = compiled(Model(layers=1), backend)
        with pytest.raises(InvalidArgument, match=r"step\(16\) ran no graph of 16 tokens"):
            backend.capture(lambda tokens: step(*batch(5)), progress=False)

    def test_graphs_that_were_not_freed_stay_in_the_report(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend, stand_in = make()
        compiled(model := Model(layers=1), backend)(*batch(5))
        held, pool = backend.report().pool_bytes, backend.pool
        graph = stand_in.recorded[0]
        monkeypatch.setattr(graph, "reset", lambda: 1 / 0)
        with pytest.warns(RuntimeWarning, match="division by zero"):
            backend.clear()
        assert 0 < backend.report().pool_bytes == stand_in.held(pool) <= held
        del model

    def test_a_device_that_fails_does_not_stop_a_clear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend, stand_in = make()
        compiled(model := Model(layers=1), backend)(*batch(5))
        pool = backend.pool
        monkeypatch.setattr(stand_in, "wait", lambda: 1 / 0)
        with pytest.warns(RuntimeWarning, match="division by zero"):
            cleared = backend.clear()
        assert (stand_in.held(pool), backend.pool != pool, len(cleared.failures)) == (0, True, 1)
        del model

    def test_a_recording_keeps_nothing_after_clear(self) -> None:
        backend, _ = make()
        compiled(model := Model(layers=1), backend)(*batch(5))
        (runner,) = backend._runners
        (lane,) = runner.lanes.values()
        (recording,) = lane.recordings.values()
        backend.clear()
        assert (recording.graphs, recording.padded, runner.lanes) == ({}, {}, {})
        del model


class TestCudaGraphs:
    """What it decides without a GPU."""

    def test_tensors_of_another_device_than_the_current_one_are_not_captured(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        mechanism = CudaGraphs()
        assert mechanism.why_not(torch.device("cuda", 1)) == "tensors are on cuda:1, the current device is 0"
        assert mechanism.why_not(torch.device("cuda", 0)) == ""

    def test_each_lane_captures_on_a_stream_that_nothing_else_uses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handed = iter([7, 7, 8, 9, 7, 8, 9, 10] + [7] * 100)

        class Stream:
            def __init__(self) -> None:
                self.cuda_stream = next(handed)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        mechanism = CudaGraphs()
        for calls_come_on in (0, 8, 7):
            mechanism._streams[0, calls_come_on] = mechanism._stream_of_its_own((0, calls_come_on))
        assert [stream.cuda_stream for stream in mechanism._streams.values()] == [7, 9, 10]
        with pytest.raises(Unsupported, match="calls came on 4 streams"):
            mechanism._stream_of_its_own((0, 11))
