# Every command a user or a developer of Ingot needs. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the CPU build of PyTorch is published, for machines whose pip does not know one already.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: help setup pretrain test test-all test-gpu test-cluster check bench clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.native ## make .venv, install the pinned packages, build the extension

# A CPU-only machine must not fetch the CUDA build: try what pip already knows, then PyTorch's own index.
$(VENV)/.packages: constraints.txt setup.py pyproject.toml
	@command -v g++ >/dev/null || { echo "error: g++ was not found; install a C++17 compiler (Debian: apt-get install g++)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages (a few minutes the first time)"
	@if command -v nvidia-smi >/dev/null; then $(PIP) "$(TORCH)"; \
	else $(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX); fi
	@$(PIP) setuptools wheel pybind11 numpy
	@$(PIP) --no-build-isolation -e '.[dev,mpi]'
	@touch $@

$(VENV)/.native: $(VENV)/.packages $(wildcard csrc/*.cpp csrc/core/*.cpp csrc/core/*.h)
	@echo "building the C++ extension"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
