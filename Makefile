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
# What the compiled core is made of, and the stamp of its build in place.
CORE := CMakeLists.txt $(wildcard multialign/ops/_native/*.c multialign/ops/_native/*.h)
BUILT := build/native/.built
CMAKE := $(VENV)/bin/cmake
# Where the core is built with sanitizers, and the tests that run on it.
CHECKED := $(CURDIR)/build/sanitized
SANITIZED := $(wildcard tests/test_native*.py) tests/test_hostile_transport.py
DIGITS := --config examples/decalign/configs/digits.yaml --seeds 1 2 3

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help test test-long native native-check coverage mutants example lint format types docs wheel release-check bench fuzz test-gpu bench-gpu clean

help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 15

test: $(VENV)/.installed-test $(VENV)/.installed-example $(VENV)/.installed-triton $(BUILT) ## Run the tests and the examples in the docstrings
	$(PY) -m pytest $(PARALLEL) $(ARGS)

test-long: $(VENV)/.installed-test $(VENV)/.installed-example $(VENV)/.installed-triton $(BUILT) ## Run the slow cases that `test` leaves out
	$(PY) -m pytest -m long $(PARALLEL) $(ARGS)

native: $(BUILT) ## Build the compiled core in place, where there is a C compiler

native-check: $(VENV)/.installed-test $(VENV)/.installed-cmake ## Test the compiled core under AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p $(CHECKED) && rm -f $(CHECKED)/report.*
	@$(CMAKE) -S . -B $(CHECKED) -DMULTIALIGN_SANITIZE=ON > $(CHECKED)/configure.log 2>&1 || { cat $(CHECKED)/configure.log; exit 1; }
	@$(CMAKE) --build $(CHECKED) > $(CHECKED)/build.log 2>&1 || { cat $(CHECKED)/build.log; exit 1; }
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:log_path=$(CHECKED)/report UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CHECKED)/report \
	MULTIALIGN_NATIVE_LIBRARY=$(CHECKED)/core.so \
	$(PY) -m pytest $(SANITIZED) $(PARALLEL) $(ARGS) || { cat $(CHECKED)/report.*; exit 1; }

# What torch.compile traces it does not run line by line, and afterwards coverage sees nothing more.
coverage: $(VENV)/.installed-test $(VENV)/.installed-triton $(BUILT) ## Measure which lines and branches of multialign the tests run
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest $(PARALLEL) -m "not transforms and not long" --ignore-glob="tests/test_decalign*" --ignore=tests/test_examples.py $(ARGS)
	$(PY) -m coverage combine --quiet
	$(PY) -m coverage report --show-missing --skip-covered

mutants: $(VENV)/.installed-test $(VENV)/.installed-mutants $(BUILT) ## Change the formulas one by one and see which changes the tests miss (an hour)
	$(VENV)/bin/mutmut run --max-children 1
	$(VENV)/bin/mutmut results

fuzz: $(VENV)/.installed-test $(BUILT) ## Give random hostile problems to every loss, going on from the last run (ARGS="--seconds 600")
	$(PY) -m tests.fuzz $(ARGS)

example: $(VENV)/.installed-example $(BUILT) ## Train and evaluate the reference model on digits
	$(PY) -m $(EXAMPLE) ablate --halves modules $(DIGITS) $(ARGS)
	$(PY) -m $(EXAMPLE) figures runs/decalign-digits

lint: $(VENV)/.installed-lint ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.c %.h,$(CORE))

format: $(VENV)/.installed-lint ## Fix what lint can fix by itself
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(filter %.c %.h,$(CORE))

types: $(VENV)/.installed-lint ## Check types
	$(PY) -m mypy --strict multialign

docs: $(VENV)/.installed-docs $(VENV)/.installed-test $(BUILT) ## Build the documentation, run the gallery, and open each page in a browser
	rm -rf docs/_build/html docs/gallery
	$(PY) -m sphinx -q -W -n --keep-going -E -b html docs docs/_build/html
	$(PY) -m pytest -q tests/test_docs.py --site docs/_build/html
	@echo "docs/_build/html/index.html"

# One wheel for this platform, with the compiled core, and one that any platform can use.
.PHONY: dist
dist: $(VENV)/.installed-lint
	rm -rf dist
	$(PY) -m build --outdir dist . > /dev/null
	@echo "The pure wheel: what follows are the errors of a compiler that always fails"
	CC=/bin/false $(PY) -m build --wheel --outdir dist . > /dev/null

wheel: dist ## Build the wheels and use them and the sdist where only torch is installed
	$(PY) .ci/check_wheel.py dist --constraint $(CONSTRAINTS)

release-check: dist ## Build sdist and wheels, and test them with the oldest and newest torch
	$(PY) .ci/release_check.py dist --constraint $(CONSTRAINTS) $(ARGS)

bench: $(VENV)/.installed-test $(VENV)/.installed-example $(VENV)/.installed-bench $(BUILT) ## Measure against the peers and write benchmarks/results
	$(PY) -m benchmarks.distribution_matching
	$(PY) -m benchmarks.matching_gap
	$(PY) -m benchmarks.prototypes
	$(PY) -m benchmarks.transport
	$(PY) -m benchmarks.hostile
	$(PY) -m benchmarks.small_epsilon
	$(PY) -m benchmarks.decalign_step

# These two run with $(PYTHON) itself and install nothing: it has torch and triton for the card in
# hand, pytest and pytest-xdist.
test-gpu: ## Run the losses and the CUDA kernels on a GPU, with PYTHON as it is
	$(PYTHON) -m pytest tests/test_cuda.py tests/test_triton.py --device cuda -p no:cacheprovider -m "" --numprocesses 8 $(ARGS)

bench-gpu: ## Measure the CUDA kernels on a GPU and write OUT/gpu.csv, with PYTHON as it is
	$(PYTHON) -m benchmarks.gpu $(OUT) $(ARGS)

clean: ## Remove everything the verbs made, except runs/
	rm -rf $(VENV) build dist docs/_build docs/_generated docs/api/generated docs/gallery .hypothesis
	rm -rf mutants .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache lightning_logs
	rm -f multialign/ops/_native/core.so
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

$(VENV)/.installed-cmake: $(VENV)/.installed-torch $(CONSTRAINTS)
	@$(PIP) cmake
	@touch $@

# The stamp stands in build/, not in $(VENV): worktrees may share an environment. Without a compiler
# the library works as well, and tests of the core are skipped.
$(BUILT): $(CORE) | $(VENV)/.installed-cmake
	@mkdir -p $(@D)
	@rm -f multialign/ops/_native/core.so
	@if $(CMAKE) -S . -B $(@D) > $(@D)/configure.log 2>&1; then \
	    $(CMAKE) --build $(@D) > $(@D)/build.log 2>&1 || { cat $(@D)/build.log; exit 1; }; \
	    touch $@; \
	elif command -v $(CC) > /dev/null; then \
	    cat $(@D)/configure.log; exit 1; \
	else \
	    echo "No C compiler: the compiled core is not built, and its tests are skipped"; \
	fi

.PRECIOUS: $(VENV)/.installed-%
