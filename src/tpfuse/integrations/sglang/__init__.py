"""SGLang, with its QK norm and its fused all-reduce + norm served by tpfuse.

SGLang loads this by itself, through the entry point `sglang.srt.plugins` of an installed tpfuse. The one setting is the
environment variable TPFUSE_SGLANG: fused (the default), control or off. docs/sglang.md says what is replaced.

Reading order: plugin.py hooks into the start of a worker, state.py of `integrations.serving` makes the Communicator,
qk_norm.py and boundary.py are the two kinds of sites, operators.py is what they call, and hooks.py speaks to SGLang's
registry.
"""

from __future__ import annotations

from tpfuse.integrations.sglang.plugin import register

__all__ = ["register"]
