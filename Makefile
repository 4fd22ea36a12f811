# `make test` and `make bench` set themselves up: a virtual environment in .venv, with the versions of constraints.txt.
# It is installed again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,plot,cuda,dev,transformers
VLLM ?= vllm==0.24.0
VLLM_VENV ?= .venv-vllm
SGLANG ?= sglang==0.5.23
SGLANG_VENV ?= .venv-sglang
# What its norms, models and scheduler import. The rest of what it wants is GBs of kernels, which no test here calls.
SGLANG_NEEDS := torch==2.13.0 torchvision==0.28.0 triton transformers==5.19.0 compressed-tensors==0.18.0 \
	apache-tvm-ffi==0.1.11 aiohttp dill einops fastapi gguf ipython loguru msgspec openai==2.8.0 orjson \
	partial_json_parser psutil pybase64 pyzmq requests sentencepiece setproctitle uvicorn
PRESET ?= minimax-m2
OUT ?= out

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VLLM_VENV)/.installed
SGLANG_STAMP := $(SGLANG_VENV)/.installed
JSON = $(OUT)/ops-$(PRESET).jsonl
PNG = $(OUT)/ops-$(PRESET).png

.PHONY: help bench test gpu-test vllm-test sglang-test lint clean

help:
	@echo 'make bench        check every op, then time them against baselines: on all GPUs, or on 2 CPU ranks'
	@echo 'make test         the tests; those that need GPUs are left out where there are none'
	@echo 'make gpu-test     the tests that need GPUs (4)'
	@echo 'make vllm-test    the tests that need vLLM, on CPUs; installs it into .venv-vllm, with some GB of CUDA'
	@echo 'make sglang-test  the tests that need SGLang, on CPUs; installs it into .venv-sglang, without its kernels'
	@echo 'make lint         ruff, its formatter, and mypy'
	@echo 'make clean        remove .venv, .venv-vllm, .venv-sglang and out'
	@echo
	@echo 'PYTHON=$(PYTHON)  VENV=$(VENV)  EXTRAS=$(EXTRAS)  PRESET=$(PRESET)  OUT=$(OUT)'
	@echo 'VLLM=$(VLLM)  VLLM_VENV=$(VLLM_VENV)  SGLANG=$(SGLANG)  SGLANG_VENV=$(SGLANG_VENV)'

bench: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/tpfuse check
	$(BIN)/tpfuse bench ops --preset $(PRESET) --json $(JSON) --plot $(PNG)

# A file at a time, in the order of their names: sorted by their numbers of tests, the longest file would come last.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu

vllm-test: $(VLLM_STAMP)
	VLLM_TARGET_DEVICE=cpu $(VLLM_VENV)/bin/python -m pytest -m vllm

sglang-test: $(SGLANG_STAMP)
	$(SGLANG_VENV)/bin/python -m pytest -m sglang

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) $(OUT)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@

# torch and all else in the versions that this vLLM wants
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -e '.[test]' '$(VLLM)'
	@touch $@

$(SGLANG_STAMP): pyproject.toml
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install -e '.[test]' $(SGLANG_NEEDS)
	$(SGLANG_VENV)/bin/python -m pip install --no-deps '$(SGLANG)'
	@touch $@
