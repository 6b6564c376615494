# The single list of verbs. Each installs what it needs into .venv the first time; nothing but
# Python 3.10 or newer has to be there before.

PYTHON ?= python3
VENV ?= .venv
# The versions to install; another file of pip constraints tries other ones.
CONSTRAINTS ?= constraints.txt
# Further arguments to pytest or to the example.
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
EXAMPLE := examples.decalign
DIGITS := --config examples/decalign/configs/digits.yaml --seeds 1 2 3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help test example lint format types docs wheel bench clean

help: ## Print this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10

test: $(VENV)/.installed-test $(VENV)/.installed-example ## Run the tests and the examples in the docstrings
	$(PY) -m pytest $(ARGS)

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

docs: $(VENV)/.installed-docs ## Build the documentation into docs/_build/html
	$(PY) -m sphinx -q -W --keep-going -E -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

wheel: $(VENV)/.installed-lint ## Build the wheel and use it where only torch is installed
	rm -rf build dist
	$(PY) -m build --outdir dist . > /dev/null
	$(PY) .ci/check_wheel.py dist/*.whl --constraint $(CONSTRAINTS)

bench: $(VENV)/.installed-test ## Measure against the peers and write benchmarks/results
	$(PY) -m benchmarks.distribution_matching

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
