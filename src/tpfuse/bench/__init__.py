"""Benchmarks of the ops. Reading order:

cases            what is measured: ops, sizes and inputs
implementations  who is measured: tpfuse and the baselines
method           how a figure is taken, on CUDA and on a CPU
ceilings         what the hardware allows: bytes over rates measured in the same run
ops              `run`: all of it on W ranks
records          the rows, as JSON lines
report, plot     the rows as a table and as a picture
"""
