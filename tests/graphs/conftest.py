"""Every test of graphs begins with nothing compiled, a known seed, and without gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from stand_in import SEEN


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    SEEN.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
