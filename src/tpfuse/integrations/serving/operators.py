"""Operators that compiled code of an engine calls. They name no communicator: a worker has one TP group at a time, so a
graph that is stored on disk finds the Communicator of whatever process loads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tpfuse.communicator import empty
from tpfuse.integrations.serving.state import BOUNDARY, communicator

Operator = tuple[str, Callable[..., Any], Callable[..., Any]]  # schema, implementation, shapes of the results


def define(namespace: str, operators: Iterable[Operator]) -> torch.library.Library:
    """Register `torch.ops.<namespace>.*`. They are there as long as what is returned is."""
    library = torch.library.Library(namespace, "DEF")
    for schema, implementation, fake in operators:
        name = schema.partition("(")[0]
        # Fixed stride order: the graph's strides are those that the kernels get, so Inductor has nothing to copy.
        library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
) -> tuple[Tensor, Tensor]:
    """The norm, and the new residual stream."""
    comm = communicator(BOUNDARY, weight)
    y = comm.all_reduce_rms_norm(x, weight, residual=residual, eps=eps, weight_bias=weight_bias)
    assert y.norm is not None
    assert y.residual is not None
    return y.norm, y.residual


ADD_RMS_NORM: Operator = (
    "all_reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_bias) "
    "-> (Tensor, Tensor)",
    all_reduce_add_rms_norm,
    lambda x, residual, *_: (empty(x), empty(residual)),
)
