# The single list of verbs. Each installs what it needs into .venv the first time; nothing but
# Python 3.10 or newer has to be there before.

PYTHON ?= python3
VENV ?= .venv
# The versions to install; another file of pip constraints tries other ones.
CONSTRAINTS ?= constraints.txt
# The folder that bench-gpu writes.
OUT ?= benchmarks/results
# Further arguments to pytest or to the example.
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
EXAMPLE := examples.decalign table --config examples/decalign/configs/digits.yaml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help test fuzz example lint format types docs wheel bench test-gpu bench-gpu clean

help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

test: $(VENV)/.installed-test $(VENV)/.installed-example $(VENV)/.installed-triton ## Run the tests and the examples in the docstrings
	$(PY) -m pytest $(ARGS)

fuzz: $(VENV)/.installed-test ## Give random hostile problems to every loss, going on from the last run (ARGS="--seconds 600")
	$(PY) -m tests.fuzz $(ARGS)

example: $(VENV)/.installed-example ## Train and evaluate the reference model on digits
	$(PY) -m $(EXAMPLE) $(ARGS)

lint: $(VENV)/.installed-lint ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-lint ## Fix what lint can fix by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.installed-lint ## Check types
	$(PY) -m mypy --strict multialign

docs: $(VENV)/.installed-docs ## Build the documentation into docs/_build/html
	$(PY) -m sphinx -q -W --keep-going -E -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel: $(VENV)/.installed-lint ## Build the wheel and use it where only torch is installed
	rm -rf build dist
	$(PY) -m build --outdir dist . > /dev/null
	$(PY) .ci/check_wheel.py dist/*.whl --constraint $(CONSTRAINTS)

bench: $(VENV)/.installed-test ## Measure against the peers and write benchmarks/results
	$(PY) -m benchmarks.distribution_matching
	$(PY) -m benchmarks.prototypes

# These two run with $(PYTHON) itself and install nothing: it has torch and triton for the card in
# hand, and pytest.
test-gpu: ## Run the tests of the CUDA kernels on a GPU, with PYTHON as it is
	$(PYTHON) -m pytest tests/test_triton.py --device cuda -p no:cacheprovider $(ARGS)

bench-gpu: ## Measure the CUDA kernels on a GPU and write OUT/gpu.csv, with PYTHON as it is
	$(PYTHON) -m benchmarks.gpu $(OUT) $(ARGS)

clean: ## Remove everything the verbs made, except runs/
	rm -rf $(VENV) build dist docs/_build docs/api/generated .hypothesis
	rm -rf .pytest_cache .mypy_cache .ruff_cache lightning_logs
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
