"""The integration of SGLang with stand-ins for its modules: its setting, that nothing it does breaks SGLang, and the
methods that it hooks."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import sglang_stand_ins as stand_ins
import torch
from sglang_stand_ins import PARALLEL, WIDTH, group_of

from tpfuse import reference
from tpfuse.integrations.serving import state
from tpfuse.integrations.sglang import boundary, hooks, qk_norm, register

GROUP = group_of([0])


@pytest.fixture
def sglang(monkeypatch, alone):
    """Stand-ins for the modules of SGLang, in a worker of a group of two."""
    group = group_of([0, 1], device_group=alone.group)
    calls = []
    modules = stand_ins.modules(group, calls)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(hooks, "_placed", set())
    registry = modules["sglang.srt.plugins.hook_registry"].HookRegistry
    parallel = modules[PARALLEL]

    def start(**given):
        """What SGLang does: load plugins, apply their hooks, make the groups."""
        register()
        registry.apply_hooks()
        parallel.initialize_model_parallel(**given)

    yield SimpleNamespace(
        modules=modules, group=group, calls=calls, registry=registry, parallel=parallel, start=start, of=modules.get
    )
    state.current = None


@pytest.fixture
def serving(alone):
    state.current = stand_ins.engaged(alone, GROUP)
    yield state.current
    state.current = None


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="tpfuse.sglang")
    return caplog


# The setting and the start of a worker


def test_a_wrong_mode_leaves_sglang_alone(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "fast")
    register()
    assert sglang.registry.hooks == {}
    assert "tpfuse stays out: TPFUSE_SGLANG=fast; supported: off, control, fused" in log.text


def test_off_hooks_nothing(sglang, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "off")
    register()
    assert sglang.registry.hooks == {}


def test_processes_without_groups_get_two_hooks_and_no_models(sglang):
    register()
    register()
    sglang.registry.apply_hooks()
    assert {target: len(placed) for target, placed in sglang.registry.hooks.items()} == {
        f"{PARALLEL}.initialize_model_parallel": 1,
        f"{PARALLEL}.destroy_model_parallel": 1,
    }
    assert state.current is None


@pytest.mark.parametrize("missing", ["registry", "group"])
def test_an_unknown_sglang_is_left_alone(sglang, log, monkeypatch, missing):
    if missing == "registry":
        monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", None)
    else:
        del sglang.parallel.get_attn_tp_group
    register()
    assert sglang.registry.hooks == {}
    assert "tpfuse stays out" in log.text


def test_a_tpfuse_that_raises_leaves_sglang_serving(sglang, log, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("mocked out")

    monkeypatch.setattr(state, "Communicator", broken)
    sglang.start()
    assert state.current.effective == "off"
    assert "requested fused, effective off, SGLang's own path: RuntimeError: mocked out" in log.text
    sglang.parallel.destroy_model_parallel()
    assert sglang.calls == ["initialize", "destroy"]
    assert state.current is None


@pytest.mark.parametrize(
    ("path", "left"),
    [("serving.state", "the start of this worker"), ("sglang.boundary", "all-reduce + norm")],
)
def test_what_can_not_be_imported_leaves_sglang_serving(sglang, log, monkeypatch, path, left):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")
    package, _, name = f"tpfuse.integrations.{path}".rpartition(".")
    monkeypatch.delattr(sys.modules[package], name)
    monkeypatch.setitem(sys.modules, f"{package}.{name}", None)
    sglang.start()
    assert f"{left}: left to SGLang: " in log.text
    assert (f"{qk_norm.CLASS}.forward" in sglang.registry.applied) == (name == "boundary")
    sglang.parallel.destroy_model_parallel()
    assert sglang.calls == ["initialize", "destroy"]
    assert "the end of this worker" not in log.text


def test_a_second_engine_of_one_rank_has_nothing_of_the_first(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")
    sglang.start()
    assert state.current is not None
    sglang.group.world_size = 1
    sglang.parallel.initialize_model_parallel()
    assert state.current is None


def test_a_backend_without_kernels_stays_out_with_its_reason(sglang, log):
    sglang.start()
    assert state.current.effective == "off"
    assert "no fused kernels" in state.current.reason
    assert len(sglang.registry.hooks) == 2


@pytest.mark.parametrize(
    ("given", "reason"), [("duplicate_tp_group", "PD multiplexing"), ("recovered_rank", "elastic expert parallelism")]
)
def test_what_does_not_go_together_stays_out(sglang, log, given, reason):
    sglang.start(**{given: True})
    assert reason in log.text
    assert state.current.comm is None


def test_one_rank_is_left_alone(sglang, log):
    sglang.group.world_size = 1
    sglang.start()
    assert state.current is None
    assert log.text == ""


def test_control_hooks_and_reports_and_serves_nothing(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")
    sglang.start()
    norm = sglang.of("sglang.srt.layers.layernorm").RMSNorm(WIDTH)
    x = torch.randn(2, WIDTH)
    y, residual = norm.forward_with_allreduce_fusion(x, x)
    assert torch.equal(residual, x + x)
    assert y.shape == x.shape
    assert sglang.of("sglang.srt.managers.scheduler").Scheduler().run_event_loop() == "SGLang's own"
    assert "requested control, effective control" in log.text
    assert "0 of 0 QK norms fused, 0 of 1 all-reduce + norms fused" in log.text
    assert "left to SGLang: 1x all-reduce + norm: mode control" in log.text


def test_fused_serves_through_the_hooks(sglang, alone, monkeypatch, log):
    monkeypatch.setattr(state, "_engaged", lambda *_: stand_ins.engaged(alone, sglang.group))
    sglang.start()
    layers = sglang.of("sglang.srt.layers.layernorm")
    x, residual = torch.randn(2, 3, WIDTH)
    for kind in (layers.RMSNorm, layers.GemmaRMSNorm):
        for attention in (True, False):
            kind(WIDTH).forward_with_allreduce_fusion(x, residual, use_attn_tp_group=attention)
    norm = sglang.of("sglang.srt.models.minimax_m2").MiniMaxM2QKRMSNorm
    made = stand_ins.qk_norm_of(1)
    q, k = norm(made._q_norm, made._k_norm).forward(torch.randn(3, stand_ins.Q), torch.randn(3, stand_ins.K))
    assert (q.shape, k.shape) == ((3, stand_ins.Q), (3, stand_ins.K))
    sglang.of("sglang.srt.managers.scheduler").Scheduler().run_event_loop()
    assert "1 of 1 QK norms fused" in log.text
    assert "left to SGLang: none seen" in log.text
    state.current = None  # the Communicator is the module's


# Probes


def test_what_is_not_there_or_takes_other_arguments_is_left_and_the_rest_goes_on(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")
    model = sglang.of("sglang.srt.models.minimax_m2").MiniMaxM2QKRMSNorm
    model.forward = lambda self, qkv: qkv
    sglang.start()
    assert "QK norm: left to SGLang: LookupError" in log.text
    assert "takes ('self', 'qkv'); known: ('self', 'q', 'k')" in log.text
    assert f"{boundary.NORMS}.GemmaRMSNorm.{boundary.METHOD}" in sglang.registry.applied


def test_a_qk_norm_with_other_attributes_is_left(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")

    def other(self, q_norm, k_norm):
        self.q, self.k = q_norm, k_norm

    sglang.of("sglang.srt.models.minimax_m2").MiniMaxM2QKRMSNorm.__init__ = other
    sglang.start()
    assert f"{qk_norm.CLASS} has no _q_norm, _k_norm, _world_size, _eps" in log.text


def test_one_norm_with_other_arguments_leaves_both(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")
    sglang.of("sglang.srt.layers.layernorm").GemmaRMSNorm.forward_with_allreduce_fusion = lambda self, x, group: x
    sglang.start()
    assert "all-reduce + norm: left to SGLang: LookupError" in log.text
    assert not [target for target in sglang.registry.hooks if boundary.METHOD in target]


def test_a_target_that_another_plugin_has_hooked_is_told(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")
    sglang.registry.applied.add(f"{qk_norm.CLASS}.forward")
    sglang.start()
    assert "SGLang has not applied the hook on sglang.srt.models.minimax_m2" in log.text


def test_a_sglang_that_does_not_tell_the_experts_group(sglang, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "control")
    del sglang.of("sglang.srt.layers.flashinfer_comm_fusion").resolve_fusion_group
    sglang.start()
    assert "all-reduce + norm behind experts: left to SGLang" in log.text
    assert f"{boundary.NORMS}.RMSNorm.{boundary.METHOD}" in sglang.registry.applied


# The sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_give_what_sglang_gives(on_ranks, dtype):
    near = {"rtol": 2**-6, "atol": 2**-6} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for result in on_ranks(2, stand_ins.run_sites, dtype):
        for name, found in result["found"].items():
            for y, expected in zip(found, result["stock"][name], strict=True):
                torch.testing.assert_close(y, expected, **near)
        for name, exact in result["exact"].items():
            for y, expected in zip(result["found"][name], exact, strict=True):
                torch.testing.assert_close(y, expected, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
        assert "1 of 1 QK norms fused, 1 of 1 all-reduce + norms fused" in result["summary"]


def sites():
    """Arguments of each kind of site, alone."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)
    qkv = torch.randn(3, stand_ins.Q + 2 * stand_ins.K, dtype=torch.bfloat16)
    q, k, _ = qkv.split([stand_ins.Q, stand_ins.K, stand_ins.K], dim=-1)
    norm, gemma = stand_ins.RMSNorm(WIDTH, 1e-5), stand_ins.GemmaRMSNorm(WIDTH, 1e-5)
    norm.weight.data = gemma.weight.data = torch.rand(WIDTH)
    return {"qk": (stand_ins.qk_norm_of(1), q, k), "norm": (norm, x, residual), "gemma": (gemma, x, residual)}


def test_the_inputs_stay_as_they_are_and_results_are_exact(serving):
    given, methods = sites(), stand_ins.hooked(GROUP)
    kept = {name: [tensor.clone() for tensor in arguments[1:]] for name, arguments in given.items()}
    for name, arguments in given.items():
        found = methods[name](*arguments)
        for tensor, before in zip(arguments[1:], kept[name], strict=True):
            assert torch.equal(tensor, before)
        for y in found:
            assert all(y.data_ptr() != tensor.data_ptr() for tensor in arguments[1:])
        if name != "qk":
            norm, x, residual = arguments
            bias = 1.0 if name == "gemma" else 0.0
            exact = reference.all_reduce_rms_norm([x], norm.weight, residual=residual, eps=1e-5, weight_bias=bias)
            torch.testing.assert_close(found[0], exact.norm, rtol=2**-8, atol=0)
            assert torch.equal(found[1], exact.residual)


@pytest.mark.parametrize("name", ["qk", "norm", "gemma"])
def test_compiled_code_calls_the_operators(name, serving):
    method, arguments = stand_ins.hooked(GROUP)[name], sites()[name]
    expected = method(*arguments)
    ran = sum(counter.calls for counter in serving.comm.report().counters)
    compiled = torch.compile(lambda *given: method(*given), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(*arguments)
    for y, other in zip(found, expected, strict=True):
        assert torch.equal(y, other)
    assert sum(counter.calls for counter in serving.comm.report().counters) == ran + 1


def operator_calls():
    given = sites()
    norm, x, residual = given["norm"]
    qk, q, k = given["qk"]
    ops = torch.ops.tpfuse_sglang
    return {
        "qk": (ops.qk_norm, (q, k, qk._q_norm.weight, qk._k_norm.weight, 1e-6)),
        "add": (ops.all_reduce_add_rms_norm, (x, residual, norm.weight, 1e-6, 1.0)),
    }


@pytest.mark.parametrize("name", ["qk", "add"])
def test_opcheck(name, serving):
    function, given = operator_calls()[name]
    torch.library.opcheck(function.default, given, test_utils=("test_schema", "test_faketensor"))


LEFT = {
    "control": "mode control",
    "another group": "another group",
    "unknown experts": "another group",
    "experts of a draft": "another group",
    "addition": "something is added to the residual",
    "cast first": "a norm of its own kind",
    "part of the row": "a norm of its own kind",
    "another residual": "another dtype or shape of the residual",
    "too wide": "rows are too wide",
    "strided": "elements of a row are not contiguous",
    "double gamma": "gamma has another dtype or device",
    "strided gamma": "gamma has another shape or layout",
}


@pytest.mark.parametrize("case", LEFT)
def test_a_boundary_calls_through_where_it_does_not_serve(case, alone):
    width = 65 if case == "too wide" else WIDTH
    norm, x, group, experts = stand_ins.RMSNorm(width), torch.randn(3, width), GROUP, None
    residual, addition = x.bfloat16() if case == "another residual" else x, None
    if case in ("another group", "experts of a draft"):
        group = group_of([2])
    if case == "experts of a draft":
        experts = GROUP
    if case == "addition":
        addition = torch.ones_like(x)
    if case == "cast first":
        norm.cast_x_before_out_mul = True
    if case == "part of the row":
        norm.variance_size_override = 32
    if case == "strided":
        x = torch.randn(width, 3).t()
    if case == "double gamma":
        norm.double()
    if case == "strided gamma":
        norm.weight.data = torch.rand(2 * width)[::2]
    state.current = stand_ins.engaged(alone, GROUP, "control" if case == "control" else "fused")
    method = stand_ins.hooked(group, experts)["norm"]
    attention = "experts" not in case
    try:
        found = method(norm, x, residual, addition, use_attn_tp_group=attention)
        expected = method.__wrapped__(norm, x, residual, addition)
        assert all(torch.equal(y, other) for y, other in zip(found, expected, strict=True))
        assert f"1x all-reduce + norm: {LEFT[case]}" in state.current.summary("left to SGLang")
        method(norm, x, residual, addition, use_attn_tp_group=attention)
        assert sum(state.current.left.values()) == 1
    finally:
        state.current = None


def test_a_norm_without_residual_is_sglangs(serving):
    norm, x, _ = sites()["norm"]
    method = stand_ins.hooked(GROUP)["norm"]
    assert torch.equal(method(norm, x), method.__wrapped__(norm, x))
    assert "0 of 0 all-reduce + norms" in serving.summary("left")


@pytest.mark.parametrize(
    "case",
    ["no worker", "control", "another world", "another group", "another dtype", "another gamma", "strided", "too wide"],
)
def test_the_qk_norm_calls_through_where_it_does_not_serve(case, alone):
    norm, q, k = sites()["qk"]
    group = group_of([2]) if case == "another group" else GROUP
    if case != "no worker":
        state.current = stand_ins.engaged(alone, GROUP, "control" if case == "control" else "fused")
    if case == "another world":
        norm._world_size = 7
    if case == "another dtype":
        q, k = q.double(), k.double()
    if case == "another gamma":
        norm._k_norm.weight = norm._k_norm.weight.double()
    if case == "strided":
        k = k.t().contiguous().t()
    if case == "too wide":
        q = torch.randn(3, 65)
        norm._q_norm.weight = torch.rand(65)
    method = stand_ins.hooked(group)["qk"]
    try:
        found = method(norm, q, k)
        assert all(torch.equal(y, other) for y, other in zip(found, method.__wrapped__(norm, q, k), strict=True))
        if state.current is not None:
            assert "0 of 1 QK norms fused" in state.current.summary("left")
    finally:
        state.current = None
