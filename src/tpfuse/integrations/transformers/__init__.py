"""Models of transformers under tensor parallelism, with every reduction deferred into the next norm.

    from tpfuse.integrations import transformers as fused

    fused.enable()
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=4, tp_plan="auto"))

Needs transformers 5.17 or 5.23 (`pip install 'tpfuse[transformers]'`). docs/transformers.md says what works.
"""

from __future__ import annotations

from tpfuse.integrations.transformers.architectures import register
from tpfuse.integrations.transformers.integration import Applied, applied, disable, enable
from tpfuse.integrations.transformers.packed import PiecewiseModel, piecewise

__all__ = ["Applied", "PiecewiseModel", "applied", "disable", "enable", "piecewise", "register"]
