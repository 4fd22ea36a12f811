# `make test` and `make bench` set themselves up: a virtual environment in .venv, with the versions of constraints.txt.
# It is installed again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,plot,cuda,dev,transformers
VLLM ?= vllm==0.24.0
VLLM_VENV ?= .venv-vllm
PRESET ?= minimax-m2
OUT ?= out

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VLLM_VENV)/.installed
JSON = $(OUT)/ops-$(PRESET).jsonl
PNG = $(OUT)/ops-$(PRESET).png

.PHONY: help bench test gpu-test vllm-test lint clean

help:
	@echo 'make bench     check every op, then time them against baselines: on all GPUs, or on 2 CPU ranks'
	@echo 'make test      the tests; those that need GPUs are left out where there are none'
	@echo 'make gpu-test  the tests that need GPUs (4)'
	@echo 'make vllm-test the tests that need vLLM, on CPUs; installs it into .venv-vllm, with some GB of CUDA'
	@echo 'make lint      ruff, its formatter, and mypy'
	@echo 'make clean     remove .venv, .venv-vllm and out'
	@echo
	@echo 'PYTHON=$(PYTHON)  VENV=$(VENV)  EXTRAS=$(EXTRAS)  PRESET=$(PRESET)  OUT=$(OUT)'
	@echo 'VLLM=$(VLLM)  VLLM_VENV=$(VLLM_VENV)'

bench: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/tpfuse check
	$(BIN)/tpfuse bench ops --preset $(PRESET) --json $(JSON) --plot $(PNG)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu

vllm-test: $(VLLM_STAMP)
	VLLM_TARGET_DEVICE=cpu $(VLLM_VENV)/bin/python -m pytest -m vllm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OUT)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@

# torch and all else in the versions that this vLLM wants
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -e '.[test]' '$(VLLM)'
	@touch $@
