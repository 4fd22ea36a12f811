"""Partition, padding, capture, clear and capture again, on a CPU, with the stand-in of stand_in.py for CUDA graphs."""

from __future__ import annotations

import gc
import io
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import rich
import torch
from rich.console import Console
from stand_in import SEEN, SIZES, Model, Recorded, StandIn, batch, compiled, equal, fresh, make, rows  # noqa: F401  fresh: a fixture of all tests here
from torch import Tensor, nn

from tpfuse import Communicator, graphs
from tpfuse.errors import InvalidArgument, Unsupported


class TestPartition:
    def test_pieces_stand_between_split_operators(self) -> None:
        backend, stand_in = make()
        model = Model(layers=3)
        compiled(model, backend)(*batch(4))
        report = backend.report()
        assert (report.runners, report.pieces, report.split_calls) == (1, 4, 3)
        assert len(stand_in.recorded) == 4

    @pytest.mark.parametrize(
        "name",
        [
            "graphs_test::square_",
            "graphs_test.square_",
            "graphs_test::square_.default",
            torch.ops.graphs_test.square_,
            torch.ops.graphs_test.square_.default,
        ],
    )
    def test_an_operator_can_be_named_in_each_way(self, name: Any) -> None:
        def model(x: Tensor) -> Tensor:
            y = x + 1
            torch.ops.graphs_test.square_(y, x.shape[0])
            return y * 2

        backend, _ = make(split_ops=[name])
        equal(compiled(model, backend)(rows(3)), model(rows(3)))
        assert backend.report().split_calls == 1

    def test_a_function_can_be_split_at(self) -> None:
        def model(x: Tensor) -> Tensor:
            return torch.nn.functional.gelu(x + 1) * 2

        backend, stand_in = make(split_ops=[torch.nn.functional.gelu])
        step = compiled(model, backend)
        for tokens in (3, 4, 7):
            equal(step(rows(tokens)), model(rows(tokens)))
        assert len(stand_in.recorded) == 4

    def test_unknown_operators_and_wrong_settings_are_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="no operator of torch"):
            graphs.Piecewise(["tpfuse::no_such_thing"], [4])
        for wrong in ({"sizes": []}, {"sizes": [0]}, {"sizes": [4], "warmup": -1}):
            with pytest.raises(InvalidArgument, match="needed"):
                graphs.Piecewise(["tpfuse::attention"], **wrong)
        with pytest.raises(InvalidArgument, match="list of operators"):
            graphs.Piecewise("tpfuse::attention", [4])

    def test_split_operators_get_the_real_tokens_and_real_counts(self) -> None:
        def model(x: Tensor) -> Tensor:
            y = torch.relu(x).view(-1, 4)
            torch.ops.graphs_test.square_(y, x.shape[0] * 2 + 1)
            return y.view(x.shape[0], 8) + x

        backend, _ = make(split_ops=["graphs_test::square_"])
        step = compiled(model, backend)
        for tokens in (5, 8, 3, 5):
            equal(step(rows(tokens)), model(rows(tokens)))
            assert set(SEEN) == {(2 * tokens, 4, 2 * tokens + 1)}
            SEEN.clear()

    def test_results_of_functional_operators_go_to_padded_buffers(self) -> None:
        def model(x: Tensor) -> tuple[Tensor, Tensor, int]:
            a, b = torch.ops.graphs_test.pair(x * 3)
            return a.mul_(b) + x, b, x.shape[0] * 2

        backend, _ = make(split_ops=["graphs_test::pair"])
        step = compiled(model, backend)
        for tokens in (5, 8, 3, 20, 5):
            *given, count = step(rows(tokens))
            *wanted, _ = model(rows(tokens))
            assert count == 2 * tokens
            for one, other in zip(given, wanted, strict=True):
                equal(one, other)

    def test_tokens_may_be_in_any_dimension(self) -> None:
        def model(x: Tensor) -> Tensor:
            y = x * 2
            a, _ = torch.ops.graphs_test.pair(y)
            return a.transpose(1, 2) + 1

        backend, _ = make(split_ops=["graphs_test::pair"])
        step = torch.compile(model, backend=backend)
        for tokens in (5, 8, 3):
            x = torch.randn(2, tokens, 4)
            torch._dynamo.mark_dynamic(x, 1)
            equal(step(x), model(x))
        assert backend.report().misses == {}

    def test_a_second_dynamic_dimension_is_an_error_that_names_it(self) -> None:
        backend, _ = make()
        x, y = rows(5), torch.randn(3, 8)
        for tensor in (x, y):
            torch._dynamo.mark_dynamic(tensor, 0)
        with pytest.raises(Exception, match=r"2 dynamic dimensions .*dimension 0 of l_x_.*dimension 0 of l_y_"):
            torch.compile(lambda x, y: x.sum(0) + y.sum(0), backend=backend)(x, y)

    def test_inputs_that_torch_does_not_relate_must_agree(self) -> None:
        backend, _ = make(split_ops=["graphs_test::pair"])
        step = compiled(lambda x, y: (torch.ops.graphs_test.pair(x)[0] + 1, y * 2), backend)
        for tokens in (5, 3, 8):
            given = step(rows(tokens), rows(tokens))
            equal(given[0], rows(tokens) * 2 + 1)
            equal(given[1], rows(tokens) * 2)
        with pytest.raises(InvalidArgument, match=r"different numbers of tokens: l_x_ 5, l_y_ 6"):
            step(rows(5), rows(6))

    def test_a_split_operator_whose_result_has_no_tokens_is_an_error_where_a_piece_reads_it(self) -> None:
        backend, _ = make(split_ops=[torch.amax])
        with pytest.raises(Exception, match="has no dimension of tokens, and a piece reads it"):
            compiled(lambda x: x * 2 / torch.amax(x), backend)(rows(5))

    def test_no_dynamic_dimension_is_an_error_where_something_is_to_be_split(self) -> None:
        backend, _ = make()
        with pytest.raises(Exception, match="no dynamic dimension that could be tokens"):
            torch.compile(Model(), backend=backend)(*batch(5))

    def test_a_graph_of_constant_shapes_with_nothing_to_split_runs_eagerly_and_says_so(self) -> None:
        backend, stand_in = make()
        x = torch.randn(3, 8)
        equal(torch.compile(lambda x: x * 2, backend=backend)(x), x * 2)
        assert backend.report().eager == {"compiled for constant shapes: nothing to split at, no tokens": 1}
        assert stand_in.recorded == []

    def test_tokens_in_two_dimensions_at_a_border_are_an_error(self) -> None:
        backend, _ = make(split_ops=["graphs_test::pair"])
        with pytest.raises(Exception, match="in ONE dimension"):
            compiled(lambda x: torch.ops.graphs_test.pair(x @ x.T)[0] + 1, backend)(rows(5))

    def test_gradients_are_refused(self) -> None:
        backend, _ = make()
        with torch.enable_grad(), pytest.raises(Unsupported, match="graphs are for inference"):
            compiled(Model(), backend)(*batch(5))

    def test_a_compiler_gets_each_piece(self) -> None:
        pieces: list[int] = []

        def compiler(piece: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            pieces.append(len(inputs))
            return piece.forward

        backend, _ = make(compiler=compiler)
        model = Model(layers=2)
        equal(compiled(model, backend)(*batch(6)), model(*batch(6)))
        assert len(pieces) == 3

    @pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a compiler")
    def test_pieces_compiled_by_inductor(self) -> None:
        from torch._inductor.compile_fx import compile_fx

        backend, _ = make(compiler=compile_fx)
        model = Model(layers=2)
        step = compiled(model, backend)
        for tokens in (5, 16, 3, 20, 5):
            equal(step(*batch(tokens)), model(*batch(tokens)))
        assert backend.report().graphs == 9

    @pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="Inductor needs a compiler")
    def test_pieces_compiled_by_inductor_take_inputs_of_any_strides(self) -> None:
        from torch._inductor.compile_fx import compile_fx

        def model(x: Tensor) -> Tensor:
            return torch.ops.graphs_test.pair(x * 2)[0].exp()

        backend, _ = make(split_ops=["graphs_test::pair"], compiler=compile_fx)
        step = compiled(model, backend)
        for tokens in (5, 16, 20):
            strided = rows(tokens, 16)[:, :8]
            equal(step(strided), model(strided))


class TestPadding:
    def test_on_between_and_beyond_the_sizes(self) -> None:
        backend, _ = make()
        model = Model()
        step = compiled(model, backend)
        for tokens in (16, 4, 2, 9, 8, 5, 17, 15, 40, 16, 17):
            equal(step(*batch(tokens, seed=tokens)), model(*batch(tokens, seed=tokens)))
        report = backend.report()
        assert report.misses == {17: 2, 40: 1}
        assert {s.size: (s.calls, s.tokens, s.padding) for s in report.sizes} == {
            16: (4, 56, 8),
            8: (2, 13, 3),
            4: (2, 6, 2),
        }
        assert report.waste == 13 / (75 + 13)

    def test_zero_and_one_token_after_capture(self) -> None:
        backend, _ = make()
        model = Model()
        step = compiled(model, backend)
        backend.capture(lambda tokens: step(*batch(tokens)))
        for tokens in (1, 0, 3, 0, 1):
            equal(step(*batch(tokens)), model(*batch(tokens)))
        report = backend.report()
        assert report.runners == 1
        assert report.eager == {}
        assert report.sizes[-1].replays == 5

    def test_zero_and_one_token_before_capture_run_eagerly_and_say_so(self) -> None:
        backend, _ = make()
        model = Model()
        step = compiled(model, backend)
        for tokens in (1, 0, 5):
            equal(step(*batch(tokens)), model(*batch(tokens)))
        assert backend.report().eager == {"compiled for constant shapes: 0 or 1 tokens, or none marked": 2}

    def test_padding_is_zero_and_attention_never_sees_it(self) -> None:
        seen: list[int] = []

        def core(q: Tensor, k: Tensor, v: Tensor, *, selected: Tensor | None, out: Tensor) -> Tensor:
            seen.extend((q.shape[0], k.shape[0], out.shape[0]))
            return graphs.dense(q, k, v)

        backend, stand_in = make()
        step = compiled(Model(layers=1, core=core), backend)
        step(*batch(8))
        seen.clear()
        step(*batch(5))
        assert seen == [5, 5, 5]
        ids, positions = (t for t in stand_in.recorded[0].inputs if isinstance(t, Tensor) and t.shape == (8,))
        assert ids[5:].tolist() == positions[5:].tolist() == [0, 0, 0]

    def test_results_belong_to_the_caller(self) -> None:
        backend, _ = make()
        model = Model()
        step = compiled(model, backend)
        first = step(*batch(5, seed=1))
        step(*batch(5, seed=2))
        equal(first, model(*batch(5, seed=1)))

    @pytest.mark.parametrize("tokens", [5, 8])
    def test_what_the_model_writes_to_its_input_comes_back(self, tokens: int) -> None:
        def model(x: Tensor, y: Tensor) -> Tensor:
            x += 1
            torch.ops.graphs_test.square_(x, 0)
            torch.ops.graphs_test.square_(y, 0)
            return x + y

        backend, _ = make(split_ops=["graphs_test::square_"])
        step = compiled(model, backend)
        for _ in range(3):
            x, y = rows(tokens), rows(tokens) + 1
            wanted_x, wanted_y = x.clone(), y.clone()
            equal(step(x, y), model(wanted_x, wanted_y))
            equal(x, wanted_x)
            equal(y, wanted_y)

    @pytest.mark.parametrize("tokens", [5, 8])
    def test_what_only_a_piece_writes_to_its_input_comes_back(self, tokens: int) -> None:
        def model(x: Tensor) -> Tensor:
            x += 1
            return torch.ops.graphs_test.pair(x * 2)[0] + 1

        backend, _ = make(split_ops=["graphs_test::pair"])
        step = compiled(model, backend)
        for _ in range(3):
            x, wanted = rows(tokens), rows(tokens)
            equal(step(x), model(wanted))
            equal(x, wanted)

    def test_inputs_that_nobody_writes_are_not_touched(self) -> None:
        backend, _ = make()
        step = compiled(Model(), backend)
        for _ in range(2):
            ids, positions = batch(5)
            before = ids._version, positions._version
            step(ids, positions)
            assert (ids._version, positions._version) == before

    def test_inference_mode(self) -> None:
        backend, stand_in = make()
        model = Model()
        with torch.inference_mode():
            step = compiled(model, backend)
            for tokens in (5, 8, 6, 16, 5):
                equal(step(*batch(tokens)), model(*batch(tokens)))
        assert stand_in.recorded


class TestCapture:
    def test_lazily_and_once_a_size(self) -> None:
        backend, stand_in = make()
        step = compiled(Model(layers=1), backend)
        for tokens, graphs_so_far in ((5, 2), (8, 2), (3, 4), (16, 6), (5, 6)):
            step(*batch(tokens))
            assert len(stand_in.recorded) == graphs_so_far
        assert set(stand_in.pools) == {backend.pool}

    def test_capture_goes_from_the_largest_down(self) -> None:
        backend, stand_in = make()
        step = compiled(Model(layers=1), backend)
        asked: list[int] = []
        backend.capture(lambda tokens: (asked.append(tokens), step(*batch(tokens))))
        assert asked == [16, 8, 4] == list(backend.sizes)
        assert [s.captures for s in backend.report().sizes] == [1, 1, 1]
        backend.capture(lambda tokens: step(*batch(tokens)), sizes=[8])
        assert len(stand_in.recorded) == 6
        with pytest.raises(InvalidArgument, match="some of"):
            backend.capture(step, sizes=[5])

    @pytest.mark.parametrize("warmup", [0, 1, 3])
    def test_warm_ups_leave_no_trace(self, warmup: int) -> None:
        ran = 0

        class Counting(StandIn):
            def capture(self, run: Callable[..., Any], *rest: Any) -> tuple[Any, Any]:
                nonlocal ran
                result = super().capture(run, *rest)
                ran += 1
                return result

        backend = graphs.Piecewise(["tpfuse::attention"], SIZES, warmup=warmup, mechanism=Counting())
        model = Model()
        step = compiled(model, backend)
        for _ in range(2):  # the residual is updated in place, so that a warm-up that stays would show
            equal(step(*batch(6)), model(*batch(6)))
        assert ran == 4

    def test_each_stream_has_its_own(self) -> None:
        backend, stand_in = make()
        model = Model(layers=1)
        step = compiled(model, backend)
        for stream in ("main", "side", "main", "side"):
            stand_in.stream = stream
            equal(step(*batch(6)), model(*batch(6)))
        first, second = stand_in.recorded[0], stand_in.recorded[2]
        mine = {t.data_ptr() for t in first.inputs if isinstance(t, Tensor) and t.shape[0] == 8 and t.dim() == 1}
        other = {t.data_ptr() for t in second.inputs if isinstance(t, Tensor) and t.shape[0] == 8 and t.dim() == 1}
        assert not mine & other
        assert [graph.replays for graph in stand_in.recorded] == [2, 2, 2, 2]

    def test_sizes_share_their_buffers(self) -> None:
        backend, _ = make()
        step = compiled(Model(layers=1), backend)
        step(*batch(16))
        held = backend.report().buffer_bytes
        step(*batch(4))
        assert backend.report().buffer_bytes == held == 2 * 16 * 8

    def test_a_failed_capture_keeps_nothing_and_the_next_call_captures(self) -> None:
        backend, stand_in = make()
        model = Model()
        step = compiled(model, backend)
        step(*batch(8))
        calls = 0

        def fail() -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise RuntimeError("operation not permitted when stream is capturing")

        stand_in.fail = fail
        with pytest.raises(graphs.CaptureFailed, match=r"submod_\d can't be captured at 16 tokens.*not permitted"):
            step(*batch(16))
        assert [s.graphs for s in backend.report().sizes] == [0, 4, 0]
        assert not stand_in.recorded[4].alive
        for tokens in (8, 16, 16):
            equal(step(*batch(tokens)), model(*batch(tokens)))
        assert [s.graphs for s in backend.report().sizes] == [4, 4, 0]

    def test_a_piece_that_writes_a_cache_is_refused(self) -> None:
        class Caching(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("total", torch.zeros(8))

            def forward(self, x: Tensor) -> Tensor:
                self.total += x.sum(0)
                return x * 2

        backend, _ = make()
        with pytest.raises(InvalidArgument, match=r"writes to .*total.*no dimension of tokens"):
            compiled(Caching(), backend)(rows(5))

    def test_tpfuse_operators_inside_pieces(self, alone: Communicator) -> None:
        alone.prepare()
        gamma = torch.rand(16) + 0.5

        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attend = graphs.attention("fused")
                self.gamma = nn.Parameter(gamma)

            def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
                q, k = alone.qk_rms_norm(x, x * 2, self.gamma, self.gamma)
                y = self.attend(*(t.unflatten(-1, (2, 8)) for t in (q, k, x))).flatten(-2)
                norm, residual, _, _ = alone.all_reduce_rms_norm(y, self.gamma, residual=residual)
                return norm, residual

        backend, stand_in = make()
        model = Fused()
        step = compiled(model, backend)
        for tokens in (5, 8, 3, 20, 5):
            x, residual = rows(tokens, 16), rows(tokens, 16) * 3
            for given, wanted in zip(step(x, residual), model(x, residual), strict=True):
                equal(given, wanted)
        assert len(stand_in.recorded) == 4


class Scaled(nn.Module):
    """A model whose pieces read a cache."""

    def __init__(self, cache: Tensor) -> None:
        super().__init__()
        self.register_buffer("cache", cache)

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.cache
        torch.ops.graphs_test.square_(y, 0)
        return y + self.cache


class TestLifeCycle:
    def test_a_replay_without_clear_would_read_stale_memory(self) -> None:
        """What the life cycle is there for: shown with the check of addresses off."""
        backend, _ = make(split_ops=["graphs_test::square_"], check_addresses=False)
        model = Scaled(torch.full((8,), 2.0))
        step = compiled(model, backend)
        stale = step(rows(5))
        model.cache = torch.full((8,), 3.0)
        equal(step(rows(5)), stale)
        backend.clear()
        equal(step(rows(5)), model(rows(5)))

    @pytest.mark.parametrize("move", ["another tensor", "the same tensor, other memory"])
    def test_a_moved_tensor_is_an_error_until_clear(self, move: str) -> None:
        backend, _ = make(split_ops=["graphs_test::square_"])
        model = Scaled(torch.full((8,), 2.0))
        step = compiled(model, backend)
        step(rows(5))
        if move == "another tensor":
            model.cache = torch.full((8,), 3.0)
        else:
            model.cache.set_(torch.full((8,), 3.0))
        with pytest.raises(graphs.StaleGraph, match=r"cache.* moved since 8 tokens were captured"):
            step(rows(5))
        backend.clear()
        equal(step(rows(5)), model(rows(5)))

    def test_two_phases(self) -> None:
        backend, stand_in = make(split_ops=["graphs_test::square_"])
        model = Scaled(torch.full((8,), 2.0))
        step = compiled(model, backend)
        with backend.estimate() as estimate:
            backend.capture(lambda tokens: step(rows(tokens)))
        assert estimate.bytes > 0
        assert estimate.report is not None
        assert estimate.report.graphs == 6
        assert backend.report().bytes == backend.report().graphs == 0
        first_pool = stand_in.pools[0]
        model.cache = torch.full((8,), 3.0)
        backend.capture(lambda tokens: step(rows(tokens)))
        for tokens in (16, 5, 1, 0):
            equal(step(rows(tokens)), model(rows(tokens)))
        assert backend.report().graphs == 6
        assert backend.pool != first_pool
        assert set(stand_in.pools[6:]) == {backend.pool}

    def test_an_exception_in_the_first_phase_clears_too(self) -> None:
        backend, stand_in = make()
        step = compiled(Model(), backend)
        wrong = batch(5)[0].float(), batch(5)[1]
        with pytest.raises(Exception, match="embedding"), backend.estimate():
            (step(*batch(5)), step(*wrong))
        assert backend.report().graphs == 0
        assert not any(graph.alive for graph in stand_in.recorded)

    def test_clear_waits_and_gives_memory_back(self) -> None:
        backend, stand_in = make()
        step = compiled(Model(), backend)
        step(*batch(5))
        cleared = backend.clear()
        assert (cleared.runners, cleared.graphs, cleared.failures) == (1, 4, ())
        assert stand_in.log == ["wait", "give back"]
        assert backend.sizes == (16, 8, 4)
        step(*batch(5))
        assert backend.report().sizes[1].captures == 2

    def test_clear_goes_on_past_what_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend, stand_in = make()
        models = [Model(layers=1), Model(layers=2)]
        steps = [compiled(model, backend) for model in models]
        for step in steps:
            step(*batch(5))

        def reset(graph: Recorded) -> None:
            if graph is stand_in.recorded[0]:
                raise RuntimeError("driver shutting down")
            graph.alive = False

        monkeypatch.setattr(Recorded, "reset", reset)
        with pytest.warns(RuntimeWarning, match="driver shutting down"):
            cleared = backend.clear()
        assert cleared.failures == backend.report().failures == ("submod_0 at 8 tokens: driver shutting down",)
        assert [graph.alive for graph in stand_in.recorded] == [True] + 4 * [False]
        for model, step in zip(models, steps, strict=True):
            equal(step(*batch(5)), model(*batch(5)))

    def test_a_runner_that_fails_as_a_whole_does_not_stop_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend, _ = make()
        steps = [compiled(Model(layers=n), backend) for n in (1, 2)]
        for step in steps:
            step(*batch(5))
        first = next(iter(backend._runners))
        monkeypatch.setattr(first, "clear", lambda: 1 / 0)
        with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
            backend.clear()
        assert sum(bool(runner.lanes) for runner in backend._runners) == 1

    def test_runners_die_with_their_model(self) -> None:
        backend, _ = make()
        step = compiled(Model(), backend)
        step(*batch(5))
        assert backend.report().runners == 1
        del step
        torch._dynamo.reset()
        gc.collect()
        assert backend.report().runners == backend.report().graphs == 0
        assert backend.clear().runners == 0

    def test_two_models_two_backends(self) -> None:
        pairs = [(Model(layers=n), *make()) for n in (1, 2)]
        steps = [compiled(model, backend) for model, backend, _ in pairs]
        for tokens in (5, 16, 3):
            for (model, _, _), step in zip(pairs, steps, strict=True):
                equal(step(*batch(tokens)), model(*batch(tokens)))
        pairs[0][1].clear()
        assert [backend.report().graphs for _, backend, _ in pairs] == [0, 9]


class TestReport:
    def test_as_data_and_as_a_table(self) -> None:
        backend, _ = make()
        step = compiled(Model(), backend)
        for tokens in (5, 5, 8, 20):
            step(*batch(tokens))
        report = backend.report().as_dict()
        assert report["mechanism"] == "recording stand-in"
        assert (report["graphs"], report["replays"], report["misses"]) == (4, 2, {20: 1})
        assert report["waste"] == report["sizes"][1]["waste"] == 6 / 24
        assert report["bytes"] == report["pool_bytes"] + report["buffer_bytes"] > 0
        assert report["sizes"][1]["seconds"] > 0
        out = io.StringIO()
        rich.print(backend.report(), file=out)
        assert "25.0%" in out.getvalue()
        assert "miss: 20 tokens" in out.getvalue()

    def test_a_cpu_runs_the_pieces_eagerly_and_says_so(self) -> None:
        backend = graphs.Piecewise(["tpfuse::attention"], SIZES)
        model = Model()
        step = compiled(model, backend)
        for tokens in (5, 16, 20):
            equal(step(*batch(tokens)), model(*batch(tokens)))
        report = backend.report()
        assert report.eager == {"tensors are on cpu; CUDA graphs need GPUs": 3}
        assert report.graphs == report.bytes == 0
        assert backend.clear().failures == ()

    def test_the_bar_is_shown_on_terminals_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for terminal in (True, False):
            backend, _ = make()
            step = compiled(Model(layers=1), backend)
            console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
            monkeypatch.setattr("rich.get_console", lambda console=console: console)
            monkeypatch.setattr("rich.progress.get_console", lambda console=console: console)
            backend.capture(lambda tokens, step=step: step(*batch(tokens)))
            assert ("capturing" in console.file.getvalue()) == terminal

    def test_nothing_warns(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            backend, _ = make()
            compiled(Model(), backend)(*batch(5))
            backend.clear()
