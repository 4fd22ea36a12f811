# `make test` and `make bench` set themselves up: a virtual environment in .venv, with the versions of constraints.txt.
# It is installed again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,plot,cuda,dev,transformers
PRESET ?= minimax-m2
OUT ?= out

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JSON = $(OUT)/ops-$(PRESET).jsonl
PNG = $(OUT)/ops-$(PRESET).png

.PHONY: help bench test gpu-test lint clean

help:
	@echo 'make bench     check every op, then time them against baselines: on all GPUs, or on 2 CPU ranks'
	@echo 'make test      the tests; those that need GPUs are left out where there are none'
	@echo 'make gpu-test  the tests that need GPUs (4)'
	@echo 'make lint      ruff, its formatter, and mypy'
	@echo 'make clean     remove .venv and out'
	@echo
	@echo 'PYTHON=$(PYTHON)  VENV=$(VENV)  EXTRAS=$(EXTRAS)  PRESET=$(PRESET)  OUT=$(OUT)'

bench: $(STAMP)
	@mkdir -p $(OUT)
	$(BIN)/tpfuse check
	$(BIN)/tpfuse bench ops --preset $(PRESET) --json $(JSON) --plot $(PNG)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OUT)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]' -c constraints.txt
	@touch $@
