"""What a communicator remembers of calls: checks and route of each signature, once. Whatever they depend on is part of
the signature, so a call that differs in it is checked and served on its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tpfuse import Communicator, Rope, communicator, quant
from tpfuse.errors import CommunicatorClosed


def given(op: str) -> dict[str, Any]:
    """The arguments of a call that is fine, with everything that the op can take."""
    wide = torch.arange(5 * 48, dtype=torch.float32).view(5, 48) / 100
    x, k = wide[:, :32], wide[:, 32:]
    if op == "rms_norm":
        return {"x": x, "weight": torch.ones(32), "out": torch.empty(5, 32)}
    if op == "qk_rms_norm":
        rope = Rope(torch.ones(9, 4), torch.ones(9, 4), torch.arange(5), 16, 8)
        norms = {"q": x, "k": k, "q_weight": torch.ones(32), "k_weight": torch.ones(16)}
        return {**norms, "rope": rope, "out": (torch.empty(5, 32), torch.empty(5, 16))}
    if op == "all_reduce":
        return {"x": x, "out": torch.empty(5, 32)}
    scale = quant.FP8Static(torch.ones(1))
    return {"x": x, "weight": torch.ones(32), "residual": torch.ones(5, 32), "quant": scale, "keep_norm": True}


OPS = ("rms_norm", "qk_rms_norm", "all_reduce", "all_reduce_rms_norm")


def outcome(comm: Communicator, op: str, arguments: dict[str, Any]) -> tuple[str, str]:
    """The error of a call."""
    try:
        getattr(comm, op)(**arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def replaced(*path: str | int, by: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """A change of one argument, or of a part of it: `path` leads to it."""

    def change(arguments: dict[str, Any]) -> None:
        name, *rest = path
        value = arguments[name]
        if not rest:
            arguments[name] = by(value)
        elif isinstance(value, tuple):
            arguments[name] = tuple(by(v) if i == rest[0] else v for i, v in enumerate(value))
        else:
            arguments[name] = replace(value, **{str(rest[0]): by(getattr(value, str(rest[0])))})

    return change


def column(x: torch.Tensor) -> torch.Tensor:
    """x with elements that lie apart."""
    return torch.cat((x, x), -1).view(*x.shape[:-1], -1, 2)[..., 0] if x.dim() == 1 else x.t().contiguous().t()


# What tensors can have wrong, each alone.
WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda x: x.double(),
    "device": lambda x: x.to("meta"),
    "width": lambda x: torch.ones(*x.shape[:-1], x.shape[-1] + 8),
    "no width": lambda x: x[..., :0],
    "no dimension": lambda x: torch.tensor(1.0),
    "stride": column,
    "gradient": lambda x: x.clone().requires_grad_(),
}
ROWS = {"rows": lambda x: torch.ones(x.shape[0] + 1, x.shape[1]), "lead": lambda x: x.unsqueeze(0)}
OVERLAP = {"overlap": lambda x: x[:1].expand(x.shape)}
TOO_WIDE = {"too wide": lambda x: torch.ones(x.shape[0], 72)}
ACTIVATION = WRONG | TOO_WIDE
OUT = {name: wrong for name, wrong in (WRONG | ROWS | OVERLAP).items() if name != "gradient"}
WEIGHT = {name: wrong for name, wrong in WRONG.items() if name != "gradient"}
TABLE = WEIGHT | {"address": lambda x: torch.ones(x.numel() + 1)[1:].view(x.shape)}
SCALE = {
    "numel": lambda x: torch.ones(2), "dtype": lambda x: x.double(), "device": lambda x: x.to("meta"),
    "gradient": lambda x: x.clone().requires_grad_(),
}  # fmt: skip

TENSORS = {
    "rms_norm": [(("x",), ACTIVATION), (("weight",), WEIGHT), (("out",), OUT)],
    "qk_rms_norm": [
        (("q",), ACTIVATION | ROWS), (("k",), ACTIVATION | ROWS), (("q_weight",), WEIGHT), (("k_weight",), WEIGHT),
        (("out", 0), OUT), (("out", 1), OUT), (("rope", "cos"), TABLE), (("rope", "sin"), TABLE),
        (("rope", "positions"), {n: WEIGHT[n] for n in ("dtype", "device", "width", "stride")}),
    ],
    "all_reduce": [(("x",), ACTIVATION), (("out",), OUT)],
    "all_reduce_rms_norm": [
        (("x",), ACTIVATION), (("weight",), WEIGHT), (("residual",), {n: OUT[n] for n in OUT if n != "overlap"}),
        (("quant", "scale"), SCALE),
    ],
}  # fmt: skip
OTHERS = {
    "rotary_dim": ("qk_rms_norm", replaced("rope", "rotary_dim", by=lambda n: 7)),
    "rotary_dim of other tables": ("qk_rms_norm", replaced("rope", "rotary_dim", by=lambda n: 12)),
    "head_dim": ("qk_rms_norm", replaced("rope", "head_dim", by=lambda n: 12)),
    "eps of three": ("qk_rms_norm", lambda arguments: arguments.update(eps=(1e-6, 1e-6, 1e-6))),
    "layout": ("all_reduce_rms_norm", lambda arguments: arguments.update(residual_layout="columns")),
    "unhashable layout": ("all_reduce_rms_norm", lambda arguments: arguments.update(residual_layout=["replicated"])),
    "rows of a shard": (
        "all_reduce_rms_norm",
        lambda arguments: arguments.update(residual_layout="row_sharded", residual=torch.ones(4, 8)),
    ),
    "no format": ("all_reduce_rms_norm", replaced("quant", by=lambda _: "fp8_static")),
    "no format, and empty": ("all_reduce_rms_norm", replaced("quant", by=lambda _: "")),
    "no format, and unhashable": ("all_reduce_rms_norm", replaced("quant", by=lambda _: [1])),
    "groups of another format": ("all_reduce_rms_norm", replaced("quant", by=lambda _: quant.FP8PerGroup())),
}  # fmt: skip
BAD = [
    pytest.param(op, replaced(*path, by=wrong), id=f"{op}-{'.'.join(map(str, path))}-{name}")
    for op, tensors in TENSORS.items()
    for path, wrongs in tensors
    for name, wrong in wrongs.items()
] + [pytest.param(op, change, id=name) for name, (op, change) in OTHERS.items()]


@pytest.mark.parametrize(("op", "change"), BAD)
def test_a_call_that_was_fine_lets_no_other_pass(alone: Communicator, op: str, change: Callable[..., None]) -> None:
    bad = given(op)
    change(bad)
    alone._served.clear()
    error = outcome(alone, op, bad)
    assert error != ("", "")
    assert not alone._served
    assert outcome(alone, op, given(op)) == ("", "")
    assert alone._served
    assert outcome(alone, op, bad) == error


SERVED_APART: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "dtype": ("rms_norm", replaced("x", by=torch.Tensor.bfloat16)),
    "rows": ("all_reduce", replaced("x", by=lambda x: x[:3])),
    "lead": ("all_reduce", replaced("x", by=lambda x: x.unsqueeze(1))),
    "row stride": ("all_reduce", replaced("x", by=torch.Tensor.contiguous)),
    "gamma": ("rms_norm", replaced("weight", by=torch.Tensor.bfloat16)),
    "gamma of q": ("qk_rms_norm", replaced("q_weight", by=torch.Tensor.half)),
    "gamma of k": ("qk_rms_norm", replaced("k_weight", by=torch.Tensor.half)),
    "eps": ("rms_norm", lambda arguments: arguments.update(eps=1e-5)),
    "eps of q": ("qk_rms_norm", lambda arguments: arguments.update(eps=(1e-5, 1e-6))),
    "eps of k": ("qk_rms_norm", lambda arguments: arguments.update(eps=(1e-6, 1e-5))),
    "weight_bias": ("rms_norm", lambda arguments: arguments.update(weight_bias=1.0)),
    "eps of the boundary": ("all_reduce_rms_norm", lambda arguments: arguments.update(eps=1e-5)),
    "weight_bias of q and k": ("qk_rms_norm", lambda arguments: arguments.update(weight_bias=1.0)),
    "weight_bias of the boundary": ("all_reduce_rms_norm", lambda arguments: arguments.update(weight_bias=1.0)),
    "no rotation": ("qk_rms_norm", lambda arguments: arguments.update(rope=None)),
    "pairs": ("qk_rms_norm", replaced("rope", "interleaved", by=lambda _: True)),
    "head_dim": ("qk_rms_norm", replaced("rope", "head_dim", by=lambda _: 8)),
    "dtype of the residual": ("all_reduce_rms_norm", replaced("residual", by=torch.Tensor.bfloat16)),
    "no residual": ("all_reduce_rms_norm", lambda arguments: arguments.update(residual=None)),
    "row-sharded": ("all_reduce_rms_norm", lambda arguments: arguments.update(residual_layout="row_sharded")),
    "format": ("all_reduce_rms_norm", replaced("quant", by=lambda _: quant.MXFP8(swizzled=False))),
    "layout of scales": ("all_reduce_rms_norm", replaced("quant", by=lambda _: quant.MXFP8(swizzled=True))),
    "no norm": ("all_reduce_rms_norm", lambda arguments: arguments.update(keep_norm=False)),
}  # fmt: skip


@pytest.mark.parametrize("what", SERVED_APART)
def test_calls_that_are_served_in_another_way_are_remembered_apart(alone: Communicator, what: str) -> None:
    op, change = SERVED_APART[what]
    usual, arguments = given(op), given(op)
    for either in (usual, arguments):
        either.pop("out", None)  # it would have to change with the rows
    change(arguments)
    alone._served.clear()
    want = getattr(alone, op)(**arguments)
    alone._served.clear()
    getattr(alone, op)(**usual)
    first = next(iter(alone._served.values()))
    got = getattr(alone, op)(**arguments)
    assert len(alone._served) == 2
    assert first not in list(alone._served.values())[1:]
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, want)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a.float(), b.float())


@pytest.mark.parametrize("op", OPS)
def test_calls_that_are_alike_are_remembered_once(alone: Communicator, op: str) -> None:
    alone._served.clear()
    before = {c["op"]: c["calls"] for c in alone.report().as_dict()["counters"]}
    for _ in range(3):
        getattr(alone, op)(**given(op))
    assert len(alone._served) == 1
    assert {c["op"]: c["calls"] for c in alone.report().as_dict()["counters"]}[op] == before.get(op, 0) + 3


def test_a_gradient_is_refused_whatever_was_remembered_without_grad_mode(alone: Communicator) -> None:
    x = torch.ones(5, 32, requires_grad=True)
    with torch.no_grad():
        alone.all_reduce(x)
    assert "requires a gradient" in outcome(alone, "all_reduce", {"x": x})[1]
    with torch.no_grad():
        alone.all_reduce(x)


def test_a_format_is_given_no_tensor_with_a_gradient_in_any_grad_mode(alone: Communicator) -> None:
    arguments, scale = given("all_reduce_rms_norm"), torch.ones(1, requires_grad=True)
    with torch.no_grad():
        alone.all_reduce_rms_norm(**arguments)
        arguments["quant"] = quant.FP8Static(scale)
        assert "without gradient" in outcome(alone, "all_reduce_rms_norm", arguments)[1]


@pytest.mark.parametrize("op", OPS)
def test_no_tensor_is_kept(alone: Communicator, op: str) -> None:
    arguments = given(op)
    kept = [weakref.ref(value) for value in arguments.values() if isinstance(value, torch.Tensor)]
    kept += [weakref.ref(arguments["rope"].cos)] if "rope" in arguments else []
    kept += [weakref.ref(arguments["quant"].scale)] if "quant" in arguments else []
    results = getattr(alone, op)(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    kept += [weakref.ref(y) for y in results if y is not None]
    assert alone._served
    del arguments, results
    gc.collect()
    assert [ref for ref in kept if ref() is not None] == []


def test_what_is_remembered_is_bounded(alone: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator, "MOST_REMEMBERED", 3)
    alone._served.clear()
    for rows in range(10):
        assert alone.all_reduce(torch.ones(rows, 8)).shape == (rows, 8)
        assert len(alone._served) <= 3


def test_a_closed_communicator_serves_nothing_that_it_remembers(alone: Communicator) -> None:
    with Communicator() as comm:
        comm.all_reduce(torch.ones(2, 4))
    with pytest.raises(CommunicatorClosed, match="is closed; make a new one"):
        comm.all_reduce(torch.ones(2, 4))
    assert alone.all_reduce(torch.ones(2, 4)).shape == (2, 4)


def test_symbolic_sizes_are_served_and_not_remembered(alone: Communicator) -> None:
    alone._served.clear()
    gamma = torch.ones(16)
    traced = make_fx(lambda x, w: alone.all_reduce_rms_norm(x, w, residual=x).norm, tracing_mode="symbolic")
    graph = traced(torch.ones(5, 16), gamma)
    assert not alone._served
    x = torch.arange(48.0).view(3, 16)
    assert torch.equal(graph(x, gamma), alone.all_reduce_rms_norm(x, gamma, residual=x).norm)


@pytest.mark.usefixtures("alone")
def test_a_call_that_was_refused_counts_nowhere() -> None:
    comm = Communicator()
    comm.close()
    assert outcome(comm, "all_reduce", {"x": torch.ones(2, 4)})[0] == "CommunicatorClosed"
    assert comm.report().counters == ()


def test_a_trace_of_fake_tensors_leaves_no_constant_behind(alone):
    x, weight = torch.ones(2, 8), torch.ones(8)
    make_fx(lambda x, w: alone.rms_norm(x, w, eps=0.125, weight_bias=0.25), tracing_mode="fake")(x, weight)
    assert type(alone.rms_norm(x, weight, eps=0.125, weight_bias=0.25)) is torch.Tensor
