# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo compiles what it imports. To compile all that is installed takes longer than the rest; the tests need it.
COMPILING := env -u PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --no-compile --constraint constraints.txt
INSTALL := $(PIP_INSTALL) --quiet --no-build-isolation --editable
# Tests wait as much as they compute: two files at a time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help demo test test-fast test-clients fault-search test-gpu bench chaos format lint types docs clean debian-packages
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# What serving needs; httpx is the demo's client.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"HBServe needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. Give another: make PYTHON=python3.12")'
	@echo "Installing HBServe and torch into $(VENV), once. This takes minutes. It needs 1.0 GB of disk with torch for"
	@echo "the CPU, and several GB with torch for CUDA; pip's index decides which one comes."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools torch
	$(INSTALL) . httpx
	touch $@

$(VENV)/.installed: $(VENV)/.runtime scripts/install_debian_packages.sh
	$(INSTALL) '.[test]'
	-$(COMPILING) $(BIN)/python -m compileall -q -j 2 $(VENV)/lib >/dev/null  # some packages hold templates of code
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(INSTALL) '.[test,docs]'
	touch $@

# What tests of Mooncake need from Debian.
debian-packages:
	scripts/install_debian_packages.sh

demo: $(VENV)/.runtime ## Start a system here and ask it a few questions over HTTP; MODEL=smollm2 asks a real model
	$(if $(MODEL),$(PIP_INSTALL) --quiet gguf)
	$(COMPILING) $(BIN)/python scripts/demo.py $(MODEL)

test: $(VENV)/.installed debian-packages ## Run all tests that need no GPU (about 11 minutes)
	$(PYTEST)

test-fast: $(VENV)/.installed ## Run the quick tests only (at most 90 seconds)
	$(PYTEST) -m 'not gpu and not slow' tests/docs tests/unit

test-clients: $(VENV)/.installed ## Run unmodified clients of other projects; needs npm (a minute)
	scripts/install_debian_packages.sh --browser
	$(BIN)/python -m tests.clients $(CLIENTS)

fault-search: $(VENV)/.installed ## Break simulated systems until one goes wrong; options in ARGS (--seconds, --seed)
	$(BIN)/python -m tests.fault_search $(ARGS)

test-gpu: ## Run the tests that need an NVIDIA GPU, with the interpreter in PYTHON
	$(PYTHON) -m pytest -m gpu

bench: ## Measure offline throughput with the interpreter in PYTHON; options in ARGS
	$(PYTHON) -m hbserve.bench offline $(ARGS)

chaos: $(VENV)/.installed debian-packages ## Kill processes and send malformed input for 20 minutes; options in ARGS
	$(BIN)/python -m benchmarks chaos --minutes 5 $(ARGS)

format: $(VENV)/.installed ## Lay the code out, and mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: $(VENV)/.installed ## Check style and layout of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## Check types (mypy, strict)
	$(BIN)/mypy

docs: $(VENV)/.docs ## Build the documentation into build/site; a broken link is an error
	$(BIN)/mkdocs build --strict

clean: ## Remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
