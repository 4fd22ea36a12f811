"""Real kernel sources on a CPU: `simt.h` says what is emulated, `build.py` compiles and runs drivers."""
