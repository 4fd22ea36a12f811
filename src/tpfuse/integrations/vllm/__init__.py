"""vLLM, with its QK norm and its all-reduce + norm served by tpfuse.

vLLM loads this by itself, through the entry point `vllm.general_plugins` of an installed tpfuse. The one setting is the
environment variable TPFUSE_VLLM: fused (the default), control or off. docs/vllm.md says what is replaced.

Reading order: plugin.py hooks into the start of a worker, state.py of `integrations.serving` makes the Communicator,
operators.py is what compiled code calls, graph.py rewrites graphs, and passes.py, experts.py, qk_norm.py and
functions.py put these into vLLM.
"""

from __future__ import annotations

from tpfuse.integrations.vllm.plugin import register

__all__ = ["register"]
