"""tpfuse in a vLLM that was installed without its entry point: a file with `register()`, for `bench_vllm.py --hook`.

tpfuse must be importable: PYTHONPATH=src.
"""

from tpfuse.integrations.vllm import register

__all__ = ["register"]
