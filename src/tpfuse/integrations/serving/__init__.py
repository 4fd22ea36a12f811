"""What the integrations of serving engines share: their modes, what a worker process has, and who serves a call.

A process runs one engine, so there is one of everything: `state.current`. Reading order: settings.py, state.py,
operators.py.
"""
