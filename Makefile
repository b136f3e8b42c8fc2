# Every command a user or a developer of Ingot needs. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
OLD_TRITON := .venv-triton-3.6
BIN := $(VENV)/bin
# Where the CPU build of PyTorch is published, for machines whose pip does not know one already.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check
# Of what pip prints, a line for each package. Its errors go past this, to the terminal.
BRIEFLY := | sed -un 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing collected.*/  unpacking them/p'

.PHONY: help setup pretrain test test-all test-sample test-gpu test-cluster soak fuzz test-triton-3.6 check docs bench bench-kernels bench-loader bench-checkpoint bench-crawl bench-dedup bench-generate bench-lstm bench-parallel corpus-demo gpu-proof gpu-cache gpu-report clean

help: ## list the commands
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.native ## make .venv, install the pinned packages, build the extension

# A CPU-only machine must not fetch the CUDA build: try what pip already knows, then PyTorch's own index.
$(VENV)/.packages: constraints.txt setup.py pyproject.toml
	@command -v g++ >/dev/null || { echo "error: g++ was not found; install a C++17 compiler (Debian: apt-get install g++)" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null \
	  || { echo "error: Python's C headers were not found; install them (Debian: apt-get install python3-dev)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup 1/3: $(TORCH) (all of setup takes about 4 minutes on 2 cores)"
	@if command -v nvidia-smi >/dev/null; then $(PIP) "$(TORCH)" $(BRIEFLY); \
	else $(PIP) "$(TORCH)+cpu" 2>/dev/null $(BRIEFLY) || $(PIP) "$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX) $(BRIEFLY); fi
	@echo "setup 2/3: the other packages of constraints.txt"
	@$(PIP) setuptools wheel pybind11 numpy $(BRIEFLY)
	@$(PIP) --no-build-isolation -e '.[dev,mpi]' $(BRIEFLY)
	@touch $@

$(VENV)/.native: $(VENV)/.packages $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
	@echo "setup 3/3: the C++ data loader"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# One thread per rank on two cores; files are UTF-8, whatever the terminal is.
TEST_ENV := OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PYTHONUTF8=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

pretrain: setup ## prepare the corpus, train, evaluate, save, and write text (ARGS="--name=x --a.b=c")
	@$(BIN)/python launch/prepare_data.py --config $(CONFIG) $(ARGS)
	@$(QUIETLY) $(BIN)/python -m deepspeed.launcher.runner --log_level error --num_gpus $(RANKS) launch/pretrain.py --config $(CONFIG) $(ARGS)

corpus-demo: setup ## real pages with planted noise, from WARC to a trained tiny model, and what was found of the noise (docs/corpus.md)
	@OMP_NUM_THREADS=1 $(QUIETLY) $(BIN)/python -m benchmarks.crawl.demo $(ARGS)

# The GPUs there are, else two ranks on the CPU, which DeepSpeed is told: else each process warns that it finds no GPU.
GPUS := $(shell command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | wc -l || echo 0)
RANKS ?= $(if $(filter 0,$(GPUS)),2,$(GPUS))
QUIETLY := $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu)
CONFIG ?= launch/configs/$(if $(filter 0,$(GPUS)),tiny-cpu,tiny-gpu).yaml

# Tests of one process run side by side, then those that start several ranks alone.
define run_tests
@$(PYTEST) -m "$(1) and not ranks" -n auto --dist worksteal $(2) tests
@$(PYTEST) -m "$(1) and ranks" $(2) tests
endef

test: setup ## what this machine can show in about 15 minutes on 2 cores
	$(call run_tests,not slow and not gpu and not cluster)

test-all: setup ## the exhaustive lists too (hours)
	$(call run_tests,not gpu and not cluster)

# What CI runs of the exhaustive lists: another part for each commit.
ONE_IN ?= 24
test-sample: setup ## one in ONE_IN of the tests that only `make test-all` runs, chosen by the commit
	$(call run_tests,slow and not gpu and not cluster,--one-in $(ONE_IN) --chosen-by $(shell git rev-parse HEAD))

bench: setup ## training steps beside plain PyTorch and transformers, in turns (ARGS="--forms Llama"; docs/benchmarks.md)
	@$(if $(filter 0,$(GPUS)),OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu) $(BIN)/python -m benchmarks.step $(ARGS)

# On a GPU machine without a network: PY=python3 takes the machine's own packages, and nothing is set up.
PY ?= $(BIN)/python
SETUP := $(if $(filter $(BIN)/python,$(PY)),setup)

bench-kernels: $(SETUP) ## every kernel beside every other implementation installed (ARGS="--only attention"; docs/benchmarks.md)
	@$(PY) -m benchmarks.kernels $(ARGS)

bench-loader: setup ## the data loader beside those of others (15 min; ARGS="--quick": Ingot alone; results: docs/benchmarks.md)
	@$(BIN)/python -m benchmarks.loader $(ARGS)

bench-checkpoint: setup ## saves and loads beside torch DCP, DeepSpeed and safetensors (ARGS="ROUNDS MEGABYTES"; docs/benchmarks.md)
	@OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python -m benchmarks.checkpoint $(ARGS)

bench-crawl: setup ## the corpus pipeline, alone or beside datatrove and Daft (ARGS="--datatrove PYTHON --daft PYTHON"; docs/corpus.md)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.crawl $(ARGS)

bench-generate: setup ## decoding on a CPU beside transformers, in turns (ARGS="--sizes tiny"; docs/generate.md)
	@OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python -m benchmarks.generate $(ARGS)

bench-dedup: setup ## de-duplication alone, of 10 GB of made-up text (ARGS="--gigabytes 1"; docs/corpus.md)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.crawl.deduplication $(ARGS)

bench-lstm: setup ## the LSTM beside a GPT of equal size on the standard library, and docs/lstm.png (ARGS="--steps 100"; docs/lstm.md)
	@OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/python -m benchmarks.lstm $(ARGS)

bench-parallel: setup ## what ZeRO stages and recomputation cost (results: docs/benchmarks.md)
	@OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --nproc_per_node $(if $(filter 0,$(GPUS)),4,$(GPUS)) -m benchmarks.layout \
	  --config $(CONFIG) --train.micro_batch_size=4 $(ARGS)

test-gpu: $(SETUP) ## the same ladder on an NVIDIA GPU (PY=python3: with the machine's own packages; ARGS="-k attention")
	@$(PY) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null \
	  || { echo "error: PyTorch sees no NVIDIA GPU here" >&2; exit 2; }
	@$(PY) -m pytest -m gpu tests $(ARGS)

# One command for a GPU that is lent for minutes: the machine's own Python, no network. OUT: the folder of results.
BUDGET ?= 500
gpu-proof: ## right results and speed on a GPU, in BUDGET=500 seconds, without setup (ARGS="--only training"; docs/benchmarks.md)
	@$(PYTHON) -m benchmarks.gpu_proof --budget $(BUDGET) --out $(or $(OUT),runs/gpu-proof) $(ARGS)

gpu-cache: $(OLD_TRITON)/.packages ## compile here what gpu-proof launches there (PYTHON=python3.12: the GPU machine's version)
	@$(OLD_TRITON)/bin/python -m benchmarks.gpu_proof.cache $(ARGS)

gpu-report: $(SETUP) ## what gpu-proof has found, into docs/benchmarks.md (FILE=runs/gpu-proof/results.jsonl)
	@$(PY) -m benchmarks.gpu_proof.page $(FILE)

fuzz: setup ## csrc/ under sanitizers, then fuzzers: token files, plans, pages (clang, libclang-rt; FUZZ_SECONDS=60), Gluon kernels (SEED=n)
	@$(PYTEST) -s tests/data/test_data_sanitizers.py tests/data/test_data_fuzz.py tests/crawl/test_crawl_fuzz.py -k "core_is_clean or libfuzzer" --fuzz-seconds $(FUZZ_SECONDS)
	@$(PYTEST) -s tests/kernels/gluon/test_kernels_gluon_fuzz.py --fuzz-seconds $(GLUON_SECONDS) $(if $(SEED),--fuzz-seed $(SEED))
FUZZ_SECONDS ?= 60
GLUON_SECONDS ?= 180

SECONDS ?= 600
soak: setup ## a run through kills, stops, damaged checkpoints and full disks (SECONDS=600 SEED=n)
	@$(TEST_ENV) $(BIN)/python tests/faults/soak.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

test-cluster: setup ## train over two hosts made of network namespaces (root; iproute2, openssh-server, pdsh)
	@$(PYTEST) tests/hosts --require-cluster

# GPU machines still run Triton 3.6, which needs an older numpy: an environment of its own.
OLD_PIP := $(OLD_TRITON)/bin/python -m pip install -q --disable-pip-version-check
$(OLD_TRITON)/.packages: constraints.txt
	@test -x $(OLD_TRITON)/bin/python || $(PYTHON) -m venv $(OLD_TRITON)
	@$(OLD_PIP) "$(TORCH)+cpu" 2>/dev/null || $(OLD_PIP) "$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX)
	@$(OLD_PIP) triton==3.6.0 'numpy<2.4' pytest pytest-xdist hypothesis matplotlib PyYAML safetensors xxhash
	@touch $@

test-triton-3.6: $(OLD_TRITON)/.packages ## the kernels under Triton 3.6: interpreted, and compiled for every GPU (40 min; ARGS="--only regex")
	@$(TEST_ENV) $(OLD_TRITON)/bin/python -m pytest -n auto --dist worksteal -m "not slow and not gpu" tests/kernels
	@$(OLD_TRITON)/bin/python tests/kernels/gluon/machine_code.py
	@$(OLD_TRITON)/bin/python -m benchmarks.kernels.aot $(ARGS)

check: setup ## lint, formatting, types
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m pyright

# The site's generator has an environment of its own, which `make setup` does not need.
SITE := build/site
$(SITE)/.packages: docs/requirements.txt
	@test -x $(SITE)/env/bin/python || $(PYTHON) -m venv $(SITE)/env
	@$(SITE)/env/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

docs: $(SITE)/.packages ## the pages of docs/, and a reference made of the source, as a site with search: build/site/html
	@$(SITE)/env/bin/python docs/build_site.py

clean: ## remove what was built, never data/ or runs/
	rm -rf build *.egg-info llm/data/_native*.so $(VENV) $(OLD_TRITON)
