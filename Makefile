# make demo    a question about the bundled picture, answered by the embedded model
# make test    every test that needs no GPU, the conformance table included
# make cluster tests that start several processes, on this machine
# make check   format, lint, types, import layers, docs, tests: what CI runs
# make bench   side by side with transformers and llama.cpp (benchmarks/README.md); BENCH="--shape L" for options
#
# Everything happens in a virtual environment of its own. On a machine with a GPU: make CONSTRAINTS= demo

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS)

.PHONY: help demo test check format lint types layers docs cluster conformance bench pebble clean

help:
	@sed -n 's/^# //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/lapilli ask "What is in this picture?" examples/picture.png

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not network and not browser and not cluster"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance

cluster: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "cluster and not gpu and not network" tests/train

conformance: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance

check: format lint types layers docs test cluster

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

layers: $(VENV)/.installed-dev
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	@mkdir -p build
	$(BIN)/typer lapilli.cli.main utils docs --name lapilli --output build/cli.md
	diff docs/cli.md build/cli.md  # differs: cp build/cli.md docs/cli.md

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.run $(BENCH)

pebble: $(VENV)/.installed-dev
	$(BIN)/python -m lapilli.train.pebble

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
