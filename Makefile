# Each target does all of its own set-up in .venv and can be repeated. Needs Python 3.11 or 3.12, make, pip and a C++ compiler.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL ?= smollm2
PORT ?= 8000
CONFIG ?= local
BENCH_ARGS ?=

.PHONY: help setup model review test lint serve bench bench-modes bench-peers bench-isolation audit-isolation mutants load clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: install it, or name it with make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 or 3.12: name one with make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "making $(VENV)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "installing the packages of constraints.txt (about a minute the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(STAMP) ## Make .venv and install everything into it

model: $(STAMP)
	@$(BIN)/zoneserve model fetch $(MODEL)

review: model ## Review the sample claims with a local deployment; writes out/reviews
	@$(BIN)/zoneserve review --sample --config $(CONFIG)

# One numeric thread a process: tests start several replicas on few cores, and a fixed count keeps timings alike.
test: model ## Run every test that needs no GPU
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -q

lint: $(STAMP) ## Check style, types and import directions
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

serve: model ## Serve until Ctrl-C; make serve PORT=9000 CONFIG=local-monolithic for another port and one pool
	@$(BIN)/zoneserve serve --port $(PORT) --config $(CONFIG)

bench: model ## Measure the engine and a local deployment; writes out/bench.json
	@$(BIN)/python -m load_tests.bench

# Each peer has an environment of its own; one that cannot be made is reported as missing, and tried again next time.
PEER_ENVIRONMENTS := $(foreach name,llama_cpp vllm transformers chart,out/peers/$(name)/.ready)

$(PEER_ENVIRONMENTS): out/peers/%/.ready: load_tests/peers/environments.py | $(STAMP)
	@$(BIN)/python -m load_tests.peers.environments $*

bench-peers: model $(PEER_ENVIRONMENTS) ## Measure ours against llama.cpp, vLLM and transformers; writes out/peers
	@$(BIN)/python -m load_tests.peers.bench $(BENCH_ARGS)

bench-modes: model ## Measure prefill and decode apart against one pool; writes out/bench-modes.json
	@$(BIN)/python -m load_tests.bench_modes $(BENCH_ARGS)

audit-isolation: model out/peers/chart/.ready ## Time, attack and flood a local deployment across tenants; writes out/isolation.json
	@$(BIN)/python -m load_tests.isolation $(BENCH_ARGS)

bench-isolation: model ## Measure what zones and the audit log cost; writes out/bench-isolation.json
	@$(BIN)/python -m load_tests.bench_isolation $(BENCH_ARGS)

mutants: model ## Remove the zone at one hop after the other; the suite must fail for each
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m tests.isolation.mutants

load: model ## Load a local deployment for 60 s; writes out/load
	@$(BIN)/python -m load_tests.run_load

clean: ## Remove what the targets made, .venv included; the model cache stays
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
