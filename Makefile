# `make` explains; every target does its own set-up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
TRITON := $(VENV)/.ready-triton
PEERS  := $(VENV)/.ready-peers
SHELL  := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

NATIVE := CMakeLists.txt $(wildcard src/halfstep/_core/*.cpp src/halfstep/_core/*.hpp)

.PHONY: help setup demo test test-all sanitize browser lint type docs bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## .venv with the package, its extension and the pinned dependencies

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "halfstep needs Python 3.11 or newer; say: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy scikit-build-core nanobind ninja cmake
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# 285 MB that only tests need where there is no GPU: torch for CUDA brings its own.
$(TRITON): $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt triton || echo "no Triton for this machine: its tests will be skipped"
	@touch $@

# What the tests hold halfstep to or run it with: 900 MB.
$(PEERS): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  'halfstep[peers,frameworks,optimizers,scalers,logging,architectures]'
	@touch $@

demo: $(STAMP) ## a real recogniser in FP32, mixed precision and naive 16-bit; ends in report.html
	$(BIN)/halfstep demo --output report.html

test: $(STAMP) $(TRITON) browser ## lint, types and the quick tests: what CI runs
	$(MAKE) --no-print-directory lint type
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: $(STAMP) $(TRITON) $(PEERS) browser ## everything, the long tests too, with other libraries
	$(MAKE) --no-print-directory lint type
	$(MAKE) --no-print-directory sanitize
	$(BIN)/python -m pytest -m 'not gpu'

sanitize: $(STAMP) ## the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/sanitize -DHALFSTEP_SANITIZE=ON >/dev/null
	$(BIN)/cmake --build build/sanitize --parallel 2 >/dev/null
	build/sanitize/sanitize

# The report's page is tested in headless Chromium. Debian has it; only root may install it.
browser:
	@command -v chromium google-chrome >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "installing chromium for the test of the report" && \
	  { apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1 || \
	    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1; }; } || \
	  echo "no chromium: the test of the report in a browser will be skipped"

lint: $(STAMP) ## ruff and the one-way import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --verbose >/dev/null || $(BIN)/lint-imports

type: $(STAMP) ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

docs: $(STAMP) ## rewrite the tables of README.md and docs/ from the catalogues
	$(BIN)/python docs/tables.py

bench: $(STAMP) ## the performance tables
	@status=0; for theme in switch arithmetic emulate; do $(BIN)/halfstep bench $$theme || status=$$?; done; exit $$status

clean: ## remove what was built, not the data
	rm -rf $(VENV) build .pytest_cache .ruff_cache .import_linter_cache
