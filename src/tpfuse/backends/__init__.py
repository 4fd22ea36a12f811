"""Backends: each serves the four ops on its own transport. `plan.py` says which one serves what, and why."""
