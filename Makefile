# The single list of verbs. Each installs what it needs into .venv the first time; nothing but
# Python 3.10 or newer has to be there before.

PYTHON ?= python3
VENV ?= .venv
# The versions to install; another file of pip constraints tries other ones.
CONSTRAINTS ?= constraints.txt
# The folder that bench-gpu writes.
OUT ?= benchmarks/results
# How many tests run at once: auto stands for one a core, and at most 8.
WORKERS ?= auto
# Further arguments to pytest or to the example.
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# Neighbours, which share fixtures, stay together until a worker has nothing left to do.
PARALLEL := --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal
EXAMPLE := examples.decalign
DIGITS := --config examples/decalign/configs/digits.yaml --seeds 1 2 3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help test test-long coverage mutants example lint format types docs wheel release-check bench fuzz test-gpu bench-gpu clean

help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 15

test: $(VENV)/.installed-test $(VENV)/.installed-example $(VENV)/.installed-triton ## Run the tests and the examples in the docstrings
	$(PY) -m pytest $(PARALLEL) $(ARGS)

test-long: $(VENV)/.installed-test $(VENV)/.installed-example $(VENV)/.installed-triton ## Run the slow cases that `test` leaves out
	$(PY) -m pytest -m long $(PARALLEL) $(ARGS)

# What torch.compile traces it does not run line by line, and afterwards coverage sees nothing more.
coverage: $(VENV)/.installed-test $(VENV)/.installed-triton ## Measure which lines and branches of multialign the tests run
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest $(PARALLEL) -m "not transforms and not long" --ignore-glob="tests/test_decalign*" --ignore=tests/test_examples.py $(ARGS)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --show-missing --skip-covered

mutants: $(VENV)/.installed-test $(VENV)/.installed-mutants ## Change the formulas one by one and see which changes the tests miss (an hour)
	$(VENV)/bin/mutmut run --max-children 1
	$(VENV)/bin/mutmut results

fuzz: $(VENV)/.installed-test ## Give random hostile problems to every loss, going on from the last run (ARGS="--seconds 600")
	$(PY) -m tests.fuzz $(ARGS)

example: $(VENV)/.installed-example ## Train and evaluate the reference model on digits
	$(PY) -m $(EXAMPLE) ablate --halves modules $(DIGITS) $(ARGS)
	$(PY) -m $(EXAMPLE) figures runs/decalign-digits

lint: $(VENV)/.installed-lint ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-lint ## Fix what lint can fix by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.installed-lint ## Check types
	$(PY) -m mypy --strict multialign

docs: $(VENV)/.installed-docs $(VENV)/.installed-test ## Build the documentation, run the gallery, and open each page in a browser
	rm -rf docs/_build/html docs/gallery
	$(PY) -m sphinx -q -W -n --keep-going -E -b html docs docs/_build/html
	$(PY) -m pytest -q tests/test_docs.py --site docs/_build/html
	@echo "docs/_build/html/index.html"

wheel: $(VENV)/.installed-lint ## Build the wheel and use it where only torch is installed
	rm -rf build dist
	$(PY) -m build --outdir dist . > /dev/null
	$(PY) .ci/check_wheel.py dist/*.whl --constraint $(CONSTRAINTS)

release-check: $(VENV)/.installed-lint ## Build sdist and wheel, and test them with the oldest and newest torch
	rm -rf build dist
	$(PY) -m build --outdir dist . > /dev/null
	$(PY) .ci/release_check.py dist --constraint $(CONSTRAINTS) $(ARGS)

bench: $(VENV)/.installed-test $(VENV)/.installed-example $(VENV)/.installed-bench ## Measure against the peers and write benchmarks/results
	$(PY) -m benchmarks.distribution_matching
	$(PY) -m benchmarks.matching_gap
	$(PY) -m benchmarks.prototypes
	$(PY) -m benchmarks.transport
	$(PY) -m benchmarks.hostile
	$(PY) -m benchmarks.small_epsilon
	$(PY) -m benchmarks.decalign_step

# These two run with $(PYTHON) itself and install nothing: it has torch and triton for the card in
# hand, pytest and pytest-xdist.
test-gpu: ## Run the tests of the CUDA kernels on a GPU, with PYTHON as it is
	$(PYTHON) -m pytest tests/test_triton.py --device cuda -p no:cacheprovider -m "" --numprocesses 8 $(ARGS)

bench-gpu: ## Measure the CUDA kernels on a GPU and write OUT/gpu.csv, with PYTHON as it is
	$(PYTHON) -m benchmarks.gpu $(OUT) $(ARGS)

clean: ## Remove everything the verbs made, except runs/
	rm -rf $(VENV) build dist docs/_build docs/_generated docs/api/generated docs/gallery .hypothesis
	rm -rf mutants .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache lightning_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for everything, one stamp for each set of extras of pyproject.toml in it. Torch
# comes first and alone: what follows then finds it there and does not choose another build.
$(VENV)/.installed-torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PYTHON must be 3.10 or newer")'
	@echo "Installing torch into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml
	@echo "Installing the $* environment into $(VENV)"
	@$(PIP) --editable ".[$*]"
	@touch $@

.PRECIOUS: $(VENV)/.installed-%
