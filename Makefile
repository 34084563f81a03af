# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-gpu bench lint clean
.DELETE_ON_ERROR:

$(VENV)/.installed: setup.py constraints.txt scripts/install_debian_packages.sh
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test]'
	touch $@

# What tests of Mooncake need from Debian.
.PHONY: debian-packages
debian-packages:
	scripts/install_debian_packages.sh

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed debian-packages
	$(BIN)/python -m pytest -n 2 --dist loadfile # two files at a time: tests wait as much as they compute

# Needs an NVIDIA GPU; takes the interpreter that has its libraries.
test-gpu:
	$(PYTHON) -m pytest -m gpu

# Options in ARGS, see docs/benchmarks.md; takes the interpreter that has the GPU's libraries.
bench:
	$(PYTHON) -m hbserve.bench offline $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
