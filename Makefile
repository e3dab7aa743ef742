# make demo         a question about the bundled picture, answered by the embedded model
# make test         every test that needs no GPU; the golden numbers of the original as a table at the end
# make quick        the tests to run between two commits, in under a minute: no slow ones, no docs, no benchmarks
# make cluster      tests that start several processes, on this machine
# make browser      the page of the server in Chromium; skipped where chromium or playwright is missing
# make stress       the fuzzer with 20,000 damaged files, two threads with 10,000 answers: an hour or less
# make check        format, lint, types, import layers, docs, tests: what CI runs
# make clients      the client libraries that a server is tested with, in build/clients; without the registries those tests skip
# make bench        side by side with transformers and llama.cpp (benchmarks/README.md); BENCH="--shape L" for options
# make example-mixlm  MixLM's claims at a small size, docs/mixlm.md says how long; ARGS="--quick" for options
# make example-fusion  early fusion beside late fusion, a quarter of an hour (docs/fusion.md); ARGS="--toy" for options
# make pebble      the embedded model from nothing, hours; PEBBLE="--recipes pebble/recipes/warm" for options
# make example-userllm  User-LLM on MovieLens-100k (docs/userllm.md), a quarter of an hour; ARGS="--data DIR" for options
# make lock         choose the exact versions that demo and test install anew (locks/), from pyproject.toml
# make test-newest  the tests with the newest packages that pyproject.toml allows
# make test-oldest  the tests with the oldest ones (locks/oldest.txt)
#
# Everything happens in a virtual environment of its own. Another Python: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
# What belongs to this checkout itself: its dependencies and what it is built with are in the lock.
SELF := $(PIP) --quiet --no-deps --no-build-isolation --editable .
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# What Python has compiled is kept, whatever the shell says: pytest and jaxtyping rewrite every file, which takes
# each worker ten seconds.
unexport PYTHONDONTWRITEBYTECODE
HERE := not gpu and not network and not browser and not cluster

.PHONY: help demo test quick browser stress check clients format lint types layers docs cluster conformance bench example-mixlm \
	example-fusion example-userllm pebble lock test-newest test-oldest clean

help:
	@sed -n 's/^# //p' Makefile

$(BIN)/python:
	@echo "make: a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml locks/demo.txt
	@echo "make: the exact packages of locks/demo.txt; torch is the largest and takes a minute or two"
	@$(PIP) --requirement locks/demo.txt
	@echo "make: lapilli itself, its native kernels compiled if there is a compiler"
	@$(SELF)
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml locks/test.txt
	@echo "make: the exact packages of locks/test.txt; torch is the largest and takes a minute or two"
	@$(PIP) --requirement locks/test.txt
	@echo "make: lapilli itself, its native kernels compiled if there is a compiler"
	@$(SELF)
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/lapilli ask "What is in this picture?" examples/picture.png

test: $(VENV)/.installed-dev
	$(PYTEST) -m "$(HERE)"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance --processes 2

quick: $(VENV)/.installed-dev
	$(PYTEST) --hypothesis-profile quick -m "$(HERE) and not slow" --ignore=tests/docs --ignore=tests/benchmarks

browser: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/serve

stress: $(VENV)/.installed-dev
	LAPILLI_FUZZ_CASES=20000 LAPILLI_THREAD_ANSWERS=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 3600 \
		tests/fuzz/test_fuzz.py tests/pipeline/test_threads.py tests/prompt/test_sandbox.py
	LAPILLI_FUZZ_CASES=2000 LAPILLI_LOAD_SECONDS=60 LAPILLI_KILL_ROWS=2000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		--timeout 3600 tests/serve/test_fuzz.py tests/serve/test_load.py tests/cli/test_batch_distributed.py

cluster: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "cluster and not gpu and not network" tests/train tests/store tests/serve tests/cli

conformance: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance --processes 2

check: format lint types layers docs clients test cluster browser

clients:
	@PYTHON=$(PYTHON) sh tests/serve/clients/install.sh build/clients

format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/hadolint Dockerfile

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

example-mixlm: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m comparison.mixlm $(ARGS)

example-fusion: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m comparison.fusion $(ARGS)

pebble: $(VENV)/.installed-dev
	$(BIN)/python -m pebble $(PEBBLE)

example-userllm: $(VENV)/.installed-dev
	$(BIN)/python -m comparison.userllm $(ARGS)

# Locks hold for every machine that torch has a build for, so the local version of its CPU build (+cpu) is cut off,
# and what its CUDA build brings is not named. pip-compile chooses the newest versions, uv the oldest.
NEWEST = build/lock/bin/pip-compile --quiet --upgrade --strip-extras --allow-unsafe --no-header --annotation-style line \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --constraint constraints.txt
OLDEST = build/lock/bin/uv pip compile --quiet --no-header --annotation-style line --resolution lowest-direct \
	--constraint constraints.txt

lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check pip-tools uv
	$(NEWEST) --output-file locks/clients.txt locks/clients.in
	$(NEWEST) --output-file locks/demo.txt pyproject.toml locks/build.in
	$(NEWEST) --output-file locks/test.txt --extra dev pyproject.toml locks/build.in
	$(OLDEST) --output-file locks/oldest.txt --extra dev pyproject.toml
	sed -i -E -e '/^lapilli @/d' -e 's/^(torch==[0-9.]+)\+cpu/\1    /' -e '/^(nvidia|cuda|triton)/d' locks/*.txt

# torch stays where constraints.txt has it: another one is a download of gigabytes.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --constraint constraints.txt --requirement locks/build.in --editable '.[dev]'
	touch .venv-newest/.installed .venv-newest/.installed-dev
	$(MAKE) test VENV=.venv-newest

# Old packages call what newer ones beneath them deprecate: there such a warning is no failure.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --no-deps --requirement locks/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --requirement locks/build.in
	.venv-oldest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch .venv-oldest/.installed .venv-oldest/.installed-dev
	PYTEST_ADDOPTS="-W ignore::DeprecationWarning" $(MAKE) test VENV=.venv-oldest

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
