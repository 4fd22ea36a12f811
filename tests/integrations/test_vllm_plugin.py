"""The plugin around the graphs: its setting, that nothing it does breaks vLLM, and the functions it replaces, with
stand-ins for vLLM's modules."""

from __future__ import annotations

import logging
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import vllm_stand_ins as stand_ins

from tpfuse import Rope
from tpfuse.errors import CommunicatorClosed, InvalidArgument
from tpfuse.integrations.serving import state
from tpfuse.integrations.serving.settings import MODES, requested
from tpfuse.integrations.vllm import functions, operators, passes, plugin, qk_norm, register, settings

VLLM_COMPILE = SimpleNamespace(name="VLLM_COMPILE")


@pytest.fixture
def serving(alone):
    with stand_ins.serving(alone) as engaged:
        yield engaged


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins for the two modules that are hooked into, and what a worker asks them."""
    group = SimpleNamespace(unique_name="tp:0", rank_in_group=0, world_size=2, device_group=None)
    calls = []
    parallel, compilation = SimpleNamespace(use_ubatching=False), SimpleNamespace(mode=VLLM_COMPILE, cache_dir="")
    config = ModuleType("vllm.config")
    config.get_current_vllm_config = lambda: SimpleNamespace(
        parallel_config=parallel, model_config=None, compilation_config=compilation
    )
    envs, distributed = ModuleType("vllm.envs"), ModuleType("vllm.distributed")
    groups = ModuleType("vllm.distributed.parallel_state")
    root = ModuleType("vllm")
    envs.compile_factors = lambda: {"VLLM_SOMETHING": 1}
    groups.initialize_model_parallel = lambda *sizes: calls.append(("initialize", sizes))
    groups.destroy_model_parallel = lambda: calls.append(("destroy",))
    groups.get_tp_group = lambda: group
    root.envs, root.distributed, root.config, distributed.parallel_state = envs, distributed, config, groups
    root.__path__, distributed.__path__ = [], []
    for module in (root, envs, config, distributed, groups):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", raising=False)
    yield SimpleNamespace(
        envs=envs, groups=groups, group=group, calls=calls, parallel=parallel, compilation=compilation
    )
    os.environ.pop("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", None)
    state.current = None


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="vllm.tpfuse")
    return caplog


# The setting


def test_fused_is_the_default(monkeypatch):
    monkeypatch.delenv("TPFUSE_VLLM", raising=False)
    assert requested("TPFUSE_VLLM") == "fused"


def test_another_mode_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "fast")
    with pytest.raises(InvalidArgument, match="TPFUSE_VLLM=fast; supported: off, control, fused"):
        requested("TPFUSE_VLLM")


def test_a_wrong_mode_leaves_vllm_alone(vllm, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "fast")
    before = vllm.groups.initialize_model_parallel
    register()
    assert vllm.groups.initialize_model_parallel is before
    assert "tpfuse stays out: TPFUSE_VLLM=fast" in log.text


def test_off_replaces_nothing(vllm, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "off")
    before = dict(vars(vllm.groups))
    register()
    assert vars(vllm.groups) == before


def test_modes_have_keys_of_their_own():
    assert len({settings.fingerprint(mode) for mode in MODES}) == 3


# The start of a worker


def test_an_unknown_vllm_is_left_alone(vllm, log):
    del vllm.envs.compile_factors
    before = vllm.groups.initialize_model_parallel
    register()
    assert vllm.groups.initialize_model_parallel is before
    assert "vllm.envs.compile_factors is not there" in log.text


def test_registering_twice_replaces_once(vllm):
    register()
    first = vllm.groups.initialize_model_parallel
    register()
    assert vllm.groups.initialize_model_parallel is first


def test_a_tpfuse_that_raises_leaves_vllm_serving(vllm, log, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("mocked out")

    monkeypatch.setattr(state, "Communicator", broken)
    register()
    vllm.groups.initialize_model_parallel(2, 1)
    assert vllm.calls == [("initialize", (2, 1))]
    assert state.current.effective == "off"
    assert "requested fused, effective off, vLLM's own path: RuntimeError: mocked out" in log.text
    vllm.groups.destroy_model_parallel()
    assert vllm.calls[-1] == ("destroy",)
    assert state.current is None


@pytest.mark.parametrize("what", ["state", "passes"])
def test_what_can_not_be_imported_leaves_vllm_serving(what, vllm, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    name = "tpfuse.integrations.serving" if what == "state" else "tpfuse.integrations.vllm"
    path = f"{name}.{what}"
    monkeypatch.delattr(sys.modules[name], what, raising=False)
    monkeypatch.setitem(sys.modules, path, None)
    register()
    vllm.groups.initialize_model_parallel(2, 1)
    assert vllm.calls == [("initialize", (2, 1))]
    assert f"import of {path} halted" in log.text or f"cannot import name '{what}'" in log.text
    assert vllm.envs.compile_factors()["TPFUSE_VLLM"].startswith("off " if what == "state" else "control ")
    vllm.groups.destroy_model_parallel()
    assert vllm.calls[-1] == ("destroy",)


@pytest.fixture
def manager(vllm, monkeypatch):
    """A stand-in for vLLM's pass manager, in which our pass has found its place."""
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    monkeypatch.setattr(passes, "KNOWN", {})
    names = "vllm.ir", "vllm.ir.ops", "vllm.compilation", "vllm.compilation.passes"
    modules = {name: ModuleType(name) for name in names}
    found = modules["vllm.compilation.passes.inductor_pass"] = ModuleType("vllm.compilation.passes.inductor_pass")
    found.InductorPass = object
    found.get_pass_context = lambda: SimpleNamespace(compile_range=(1, 8192))
    found = modules["vllm.compilation.passes.pass_manager"] = ModuleType("vllm.compilation.passes.pass_manager")
    found.PostGradPassManager = type(
        "PostGradPassManager",
        (),
        {"stock": (), "configure": lambda self, config: setattr(self, "passes", [*self.stock])},
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    register()
    vllm.groups.initialize_model_parallel(2)
    return found.PostGradPassManager()


def test_a_pass_that_raises_leaves_vllm_its_graph(manager, log):
    manager.configure(None)
    (ours,) = manager.passes
    graph = torch.fx.Graph()
    ours(graph)  # there is no torch.ops.vllm here
    assert "all-reduce + norm: left to vLLM: AttributeError" in log.text
    assert "left: 1x a graph where tpfuse raised" in state.current.summary("left")


def test_norms_with_other_arguments_are_left_alone(vllm, manager, monkeypatch):
    known = {"rms_norm": ("x", "weight", "epsilon", "variance_size")}
    monkeypatch.setattr(passes, "KNOWN", known)
    schema = SimpleNamespace(arguments=[SimpleNamespace(name=name) for name in ("x", "weight", "epsilon")])
    norm = SimpleNamespace(default=SimpleNamespace(_schema=schema))
    monkeypatch.setattr(torch.ops, "vllm_ir", SimpleNamespace(rms_norm=norm), raising=False)
    with pytest.raises(LookupError, match=r"vllm_ir.rms_norm has the parameters \('x', 'weight', 'epsilon'\)"):
        passes.install()


def vllm_pass(name, applicable=True):
    return type(name, (), {"is_applicable_for_range": lambda self, compile_range: applicable})()


def test_the_pass_stands_before_all_that_fuse_a_norm(manager):
    before = ["NoOpEliminationPass", "SequenceParallelismPass", "AsyncTPPass", "AddRMSNormFusionPass"]
    behind = ["AllReduceFusionPass", "RMSNormReshapeFusionPass", "RMSNormQuantFusionPass", "NoOpEliminationPass"]
    manager.stock = [vllm_pass(name) for name in (*before, *behind)]
    manager.configure(None)
    assert [type(found).__name__ for found in manager.passes] == [*before, "TpfusePass", *behind]


@pytest.mark.parametrize(
    ("vllms", "kept"), [([vllm_pass("AllReduceFusionPass")], True), ([vllm_pass("AllReduceFusionPass", False)], False),
                        ([], False)],
    ids=["vLLM fuses", "vLLM fuses, but not so many tokens", "vLLM does not fuse"],
)  # fmt: skip
def test_nvfp4_is_kept_for_vllm_where_it_fuses(manager, vllms, kept, monkeypatch):
    asked = []
    monkeypatch.setattr(passes, "apply", lambda found, engaged, nvfp4: asked.append(nvfp4))
    manager.stock = vllms
    manager.configure(None)
    manager.passes[0](torch.fx.Graph())
    assert asked == [kept]


def test_a_pass_that_finds_no_place_leaves_vllm_its_passes(manager, vllm, log):
    def none():
        raise AssertionError("no TP group")

    vllm.groups.get_tp_group = none
    manager.configure(None)
    assert manager.passes == []
    assert "all-reduce + norm: left to vLLM: AssertionError: no TP group" in log.text


def test_who_imported_a_function_by_name_has_ours_too(vllm, log, monkeypatch):
    executor = ModuleType("vllm.v1.executor")
    executor.destroy_model_parallel = vllm.groups.destroy_model_parallel
    monkeypatch.setitem(sys.modules, executor.__name__, executor)
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    register()
    vllm.groups.initialize_model_parallel(2)
    executor.destroy_model_parallel()
    assert vllm.calls[-1] == ("destroy",)
    assert state.current is None


def test_a_second_engine_of_one_rank_has_nothing_of_the_first(vllm, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    register()
    vllm.groups.initialize_model_parallel(2)
    vllm.group.world_size = 1
    vllm.groups.initialize_model_parallel(1)
    assert state.current is None
    assert vllm.envs.compile_factors()["TPFUSE_VLLM"].startswith("off ")


def test_a_backend_without_kernels_stays_out_with_its_reason(vllm, log, alone):
    vllm.group.device_group = alone.group
    register()
    vllm.groups.initialize_model_parallel(2)
    assert state.current.effective == "off"
    assert "no fused kernels" in state.current.reason


def test_micro_batching_stays_out(vllm, log):
    vllm.parallel.use_ubatching = True
    register()
    vllm.groups.initialize_model_parallel(2)
    assert "micro-batching (DBO) is on" in log.text
    assert state.current.comm is None


def test_one_rank_is_left_alone(vllm, log):
    vllm.group.world_size = 1
    register()
    vllm.groups.initialize_model_parallel(1)
    assert state.current is None
    assert log.text == ""


def test_what_can_not_be_placed_is_logged_and_the_rest_goes_on(vllm, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    register()
    vllm.groups.initialize_model_parallel(2)  # none of the modules that are asked for is there
    assert "all-reduce + norm: left to vLLM: ModuleNotFoundError" in log.text
    assert "QK norm: left to vLLM: ModuleNotFoundError" in log.text
    assert "requested control, effective control" in log.text


def test_compiled_graphs_are_keyed_by_what_is_in_effect(vllm, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    register()
    before = vllm.envs.compile_factors()
    vllm.groups.initialize_model_parallel(2)
    after = vllm.envs.compile_factors()
    assert before["VLLM_SOMETHING"] == after["VLLM_SOMETHING"] == 1
    assert before["TPFUSE_VLLM"].startswith("off ")
    assert after["TPFUSE_VLLM"].startswith("control ")


def test_a_cache_dir_of_the_users_is_keyed_too(vllm, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    vllm.compilation.cache_dir = "/somewhere"
    register()
    for _ in range(2):  # a second start of the same worker
        vllm.groups.initialize_model_parallel(2)
        head, _, folder = vllm.compilation.cache_dir.rpartition("/")
        assert head == "/somewhere"
        assert folder.startswith("tpfuse-control-")
        assert folder.endswith("-passes-experts-qk_norm")  # which could not be placed: there is no vLLM here


def test_what_could_not_be_placed_is_part_of_the_key(vllm, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    register()
    vllm.groups.initialize_model_parallel(2)
    assert vllm.envs.compile_factors()["TPFUSE_VLLM"].endswith(" passes experts qk_norm")
    monkeypatch.setattr(plugin, "FEATURES", {})
    vllm.groups.initialize_model_parallel(2)
    assert not vllm.envs.compile_factors()["TPFUSE_VLLM"].endswith("qk_norm")


def test_without_compilation_the_report_says_so(vllm, log, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    vllm.compilation.mode = SimpleNamespace(name="NONE")
    register()
    vllm.groups.initialize_model_parallel(2)
    assert "compilation mode NONE, so there are no graphs to look at" in state.current.summary("left")


def test_rays_workers_get_the_settings(vllm, monkeypatch):
    monkeypatch.setenv("TPFUSE_VLLM", "off")
    monkeypatch.setenv("TPFUSE_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    for _ in range(2):
        register()
    named = os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"].split(",")
    assert named[0] == "MINE"
    assert {"TPFUSE_VLLM", "TPFUSE_CACHE_DIR"} <= set(named)
    assert len(named) == len(set(named))


def test_the_report_comes_after_warm_up(vllm, log, monkeypatch):
    class Worker:
        def compile_or_warm_up_model(self):
            return "seconds"

    module = ModuleType("vllm.v1.worker.gpu_worker")
    module.Worker = Worker
    for name in ("vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TPFUSE_VLLM", "control")
    register()
    vllm.groups.initialize_model_parallel(2)
    assert "QK norms fused" not in log.text
    assert Worker().compile_or_warm_up_model() == "seconds"
    assert "0 of 0 QK norms fused, 0 of 0 all-reduce + norms fused" in log.text


# Operators


def test_a_graph_for_tpfuse_says_so_where_tpfuse_is_out():
    state.current = None
    x = torch.ones(2, 64)
    with pytest.raises(CommunicatorClosed, match="compiled for it runs in a process where it stays out"):
        torch.ops.tpfuse_vllm.all_reduce_rms_norm(x, x[0], 1e-6, 0.0)


def qkv_of(rows=3, q=32, kv=16):
    torch.manual_seed(0)
    return torch.randn(rows, q + 2 * kv, dtype=torch.bfloat16), torch.rand(q), torch.rand(kv)


def operator_calls():
    x, w = torch.randn(3, 64), torch.rand(64)
    qkv, q_weight, k_weight = qkv_of()
    cos, sin, positions = torch.rand(9, 4), torch.rand(9, 4), torch.tensor([0, 3, 8])
    ops = torch.ops.tpfuse_vllm
    return {
        "norm": (ops.all_reduce_rms_norm, (x, w, 1e-6, 0.0)),
        "sum": (ops.all_reduce_sum_rms_norm, (x, w, 1e-6, 1.0)),
        "add": (ops.all_reduce_add_rms_norm, (x, x * 2, w, 1e-6, 0.0)),
        "quant, dynamic": (ops.all_reduce_rms_norm_quant, (x, x * 2, w, None, 1e-6, 0.0, "fp8_per_token", True)),
        "quant, static": (ops.all_reduce_rms_norm_quant, (x, None, w, w[:1].clone(), 1e-6, 0.0, "fp8_static", False)),
        "qk": (ops.qk_norm_rope, (qkv, q_weight, k_weight, cos, sin, positions, 32, 16, 16, False, 1e-6)),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name, serving):
    function, given = operator_calls()[name]
    torch.library.opcheck(function.default, given, test_utils=("test_schema", "test_faketensor"))


def test_the_norm_with_its_sum(serving):
    x, w = torch.randn(3, 64, dtype=torch.bfloat16), torch.rand(64)
    norm, total = operators.all_reduce_sum_rms_norm(x, w, 1e-6, 0.0)
    assert torch.equal(total, x)
    assert torch.equal(norm, operators.all_reduce_rms_norm(x, w, 1e-6, 0.0))


def test_the_summary_counts_sites_not_calls(serving):
    x, w = torch.randn(3, 64), torch.rand(2, 64)
    for gamma in (w[0], w[1], w[0]):
        operators.all_reduce_rms_norm(x, gamma, 1e-6, 0.0)
    serving.stock[state.QK_NORM].add(1)
    serving.left["layers.0.o_proj: a norm without gamma"] += 2
    assert "0 of 1 QK norms fused, 2 of 2 all-reduce + norms fused" in serving.summary("left")
    assert "2x layers.0.o_proj: a norm without gamma" in serving.summary("left")


# The QK norm


def stock_qk(*args):
    return "vLLM's own", args


@pytest.mark.parametrize(
    "case", ["no worker", "control", "another world", "too wide", "another dtype", "another gamma"]
)
def test_the_qk_operator_calls_through_where_it_does_not_serve(case, alone):
    qkv, q_weight, k_weight = qkv_of()
    tp_world, q_size = alone.world, 32
    effective = "control" if case == "control" else "fused"
    state.current = None if case == "no worker" else stand_ins.engaged(alone, effective)
    if case == "another world":
        tp_world = 7
    if case == "too wide":
        q_size = 65
    if case == "another dtype":
        qkv = qkv.double()
    if case == "another gamma":
        k_weight = k_weight.double()
    try:
        called = qk_norm.operator_for(stock_qk)(qkv, q_weight, k_weight, q_size, 16, 0, tp_world, 1e-6, None)
        assert called == ("vLLM's own", (qkv, q_weight, k_weight, q_size, 16, 0, tp_world, 1e-6, None))
        if state.current is not None:
            assert "0 of 1 QK norms fused" in state.current.summary("left")
    finally:
        state.current = None


def test_the_qk_operator_serves_views_of_qkv(serving):
    qkv, q_weight, k_weight = qkv_of()
    q, k = qk_norm.operator_for(stock_qk)(qkv, q_weight, k_weight, 32, 16, 0, 1, 0.25, None)
    rows = qkv[:, :32].contiguous(), qkv[:, 32:48].contiguous()
    expected = serving.comm.qk_rms_norm(*rows, q_weight, k_weight, eps=0.25)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])


def modules(monkeypatch, *made):
    """Put modules, and the packages that they are in, where an import finds them."""
    for module in made:
        parts = module.__name__.split(".")
        for n in range(1, len(parts)):
            parent = ".".join(parts[:n])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_qk_operator_with_other_arguments_is_left_alone(monkeypatch):
    home = ModuleType("vllm.model_executor.layers.minimax_rms_norm.rms_norm_tp")
    home._minimax_qk_norm_fusion = lambda qkv, q_weight: None
    package = ModuleType("vllm.model_executor.layers.minimax_rms_norm")
    package.rms_norm_tp = home
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(dispatch_key="CPU")
    modules(monkeypatch, package, home, platforms)
    monkeypatch.setattr(qk_norm, "_library", None)
    with pytest.raises(LookupError, match=r"the operator takes \('qkv', 'q_weight'\)"):
        qk_norm.install()


class StandInRotary(torch.nn.Module):
    """The attributes and the table of vLLM's RotaryEmbedding."""

    def __init__(self):
        super().__init__()
        self.head_size, self.rotary_dim, self.is_neox_style = 16, 16, True
        angles = torch.arange(32.0)[:, None] * 0.1 ** torch.arange(8)
        self.register_buffer("cos_sin_cache", torch.cat((angles.cos(), angles.sin()), -1).bfloat16())

    def forward_native(self):
        raise NotImplementedError

    forward_cuda = forward_native


class StandInNorm(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = torch.rand(width), 1e-6


class StandInAttention(torch.nn.Module):
    """The attributes of vLLM's MiniMaxM2Attention; its parts give back what they get."""

    def __init__(self, rotary):
        super().__init__()
        self.q_size, self.kv_size, self.rotary_emb = 32, 16, rotary
        self.q_norm, self.k_norm = StandInNorm(32), StandInNorm(16)

    def qkv_proj(self, x):
        return x, None

    o_proj = qkv_proj

    def attn(self, q, k, v):
        return torch.cat((q, k, v), -1)

    forward = qk_norm.forward_for(None)


def test_the_attention_rotates_in_the_norm(serving):
    attention = StandInAttention(StandInRotary())
    attention.tpfuse_rope = qk_norm._tables(attention, StandInRotary)
    qkv, _, _ = qkv_of()
    positions = torch.tensor([0, 7, 31])
    cos, sin = attention.rotary_emb.cos_sin_cache.float().chunk(2, -1)
    rope = Rope(cos.contiguous(), sin.contiguous(), positions, 16, 16)
    weights = attention.q_norm.weight, attention.k_norm.weight
    expected = serving.comm.qk_rms_norm(qkv[:, :32], qkv[:, 32:48], *weights, rope=rope)
    assert attention.tpfuse_rope
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for forward in (attention, compiled):
            assert torch.equal(forward(positions, qkv), torch.cat((*expected, qkv[:, 48:]), -1))
    buffers = dict(attention.rotary_emb.named_buffers())
    assert set(buffers) == {"cos_sin_cache", "tpfuse_cos", "tpfuse_sin"}  # which sleep mode saves
    assert "tpfuse_cos" not in attention.rotary_emb.state_dict()


def test_a_rotation_of_another_kind_is_left_to_vllm(serving, log):
    class Other(StandInRotary):
        def forward_native(self):
            raise NotImplementedError

    assert not qk_norm._tables(StandInAttention(Other()), StandInRotary)
    assert "Other rotates in a way of its own" in log.text


def test_a_head_that_the_kernels_do_not_rotate_is_left_to_vllm(serving, log):
    rotary = StandInRotary()
    rotary.head_size = 24
    assert not qk_norm._tables(StandInAttention(rotary), StandInRotary)
    assert "cuda kernels rotate heads of a power of two" in log.text


def test_two_eps_are_left_to_vllm(serving, log):
    attention = StandInAttention(StandInRotary())
    attention.k_norm.variance_epsilon = 1e-5
    assert not qk_norm._tables(attention, StandInRotary)
    assert "q and k have another eps each" in log.text


def test_a_model_that_is_built_without_values_is_left_to_vllm(serving, log):
    """Its buffers are filled later, by their names, and ours would stay what the memory had in it."""
    with torch.device("meta"):
        attention = StandInAttention(StandInRotary())
    assert not qk_norm._tables(attention, StandInRotary)
    assert "the model is built without values" in log.text


def serves(monkeypatch, architecture, attention):
    """A vLLM that serves a model of this architecture, and whose MiniMax-M2 has this attention."""
    config = ModuleType("vllm.config")
    hf = SimpleNamespace(architectures=[architecture])
    config.get_current_vllm_config = lambda: SimpleNamespace(model_config=SimpleNamespace(hf_config=hf))
    base = ModuleType("vllm.model_executor.layers.rotary_embedding.base")
    base.RotaryEmbedding = StandInRotary
    model = ModuleType("vllm.model_executor.models.minimax_m2")
    model.MiniMaxM2Attention = attention
    modules(monkeypatch, config, base, model)


def test_an_attention_that_raises_while_it_is_looked_at_is_vllms(serving, log, monkeypatch):
    class Attention(StandInAttention):
        def forward(self, positions, hidden_states):
            return "vLLM's own"

    serves(monkeypatch, "MiniMaxM2ForCausalLM", Attention)
    monkeypatch.setattr(qk_norm, "FORWARD", Attention.forward.__code__.co_names)
    qk_norm._install_rope()
    rotary = StandInRotary()
    del rotary.cos_sin_cache
    attention = Attention(rotary)
    assert attention(None, None) == "vLLM's own"
    assert "RoPE in the QK norm: left to vLLM: AttributeError" in log.text


@pytest.mark.parametrize("other", ["architecture", "forward"])
def test_another_model_keeps_its_attention(other, serving, log, monkeypatch):
    class Attention(StandInAttention):
        def forward(self, positions, hidden_states):
            return self.attn(hidden_states)

    serves(monkeypatch, "Llama" if other == "architecture" else "MiniMaxM2ForCausalLM", Attention)
    if other == "architecture":
        monkeypatch.setattr(qk_norm, "FORWARD", Attention.forward.__code__.co_names)
    stock = Attention.forward
    qk_norm._install_rope()
    assert Attention.forward is stock
    assert ("MiniMaxM2Attention.forward uses ('attn',)" in log.text) == (other == "forward")


def test_without_rotation_the_attention_is_vllms(serving):
    forward = qk_norm.forward_for(lambda self, positions, hidden_states: "vLLM's own")
    assert forward(SimpleNamespace(tpfuse_rope=False), None, None) == "vLLM's own"


# Functions of models


def stock_boundary(hidden_states, residual, norm):
    return "vLLM's own"


def test_functions_are_replaced_where_they_were_imported_before(monkeypatch):
    home, importer, stranger = (ModuleType(name) for name in ("vllm.home", "vllm.models.m3", "elsewhere"))
    for module in (home, importer, stranger):
        module.boundary = stock_boundary
        monkeypatch.setitem(sys.modules, module.__name__, module)
    plugin.rebind("boundary", stock_boundary, ours := functions.boundary_for(stock_boundary, 1.0))
    assert home.boundary is importer.boundary is ours
    assert stranger.boundary is stock_boundary


def test_a_function_with_other_arguments_is_left_alone(monkeypatch):
    home = ModuleType("vllm.home")
    home.boundary = lambda hidden_states, residual, norm, more: None
    monkeypatch.setattr(functions, "FUNCTIONS", (("vllm.home", "boundary", 0.0), ("vllm.nowhere", "boundary", 0.0)))
    modules(monkeypatch, home)
    with pytest.raises(LookupError, match=r"boundary takes .*'more'"):
        functions.install()


def test_a_function_serves_gemmas_norm(serving):
    norm = SimpleNamespace(weight=torch.rand(64), variance_epsilon=1e-5)
    x, residual = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    y = functions.boundary_for(stock_boundary, 1.0)(x, residual, norm)
    exact = serving.comm.all_reduce_rms_norm(x, norm.weight, residual=residual, eps=1e-5, weight_bias=1.0)
    assert torch.equal(y[0], exact.norm)
    assert torch.equal(y[1], exact.residual)


@pytest.mark.parametrize(
    "case",
    ["control", "another residual", "another gamma", "no gamma", "no eps", "too wide", "columns", "part of the row"],
)
def test_a_function_calls_through_where_it_does_not_serve(case, alone):
    width = 65 if case == "too wide" else 64
    norm = SimpleNamespace(weight=torch.rand(width))
    if case != "no eps":
        norm.variance_epsilon = 1e-5
    x = torch.randn(3, width)
    residual = x.bfloat16() if case == "another residual" else x
    if case == "columns":
        residual = torch.randn(width, 3).t()
    if case == "part of the row":
        norm.variance_size_override = 32
    if case == "no gamma":
        norm.weight = None
    if case == "another gamma":
        norm.weight = norm.weight.double()
    state.current = stand_ins.engaged(alone, "control" if case == "control" else "fused")
    try:
        assert functions.boundary_for(stock_boundary, 1.0)(x, residual, norm) == "vLLM's own"
    finally:
        state.current = None


def test_replacing_keeps_what_was_there():
    owner = SimpleNamespace(double=lambda x: 2 * x)
    plugin.replace(owner, "double", lambda stock, x: stock(x) + 1)
    plugin.replace(owner, "double", lambda stock, x: stock(x) + 1)
    assert owner.double(3) == 7
    assert owner.double.tpfuse_stock(3) == 6
