# make demo, make test: each sets up .venv first if it has to. Needs make and Python 3.11 or newer, with venv.
# Another interpreter: make PYTHON=python3.12 ...     More test processes: make test JOBS=8
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# One thread a process: several processes that each take every core slow each other down many times over.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu test-all check format browser clean

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile

setup: $(STAMP) ## Create .venv and install the project, with everything for training and development

demo: $(STAMP) ## Train on generated images, evaluate, predict: minutes on a laptop
	$(PY) tools/demo.py

test: $(STAMP) ## The fast tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP) ## The slow tests
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(STAMP) ## The tests that need a GPU
	$(PY) -m pytest -m gpu

test-all: $(STAMP) ## All tests
	$(PYTEST)

check: $(STAMP) ## Lint, format, types, direction of imports
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP) ## Put the code into the project's format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

browser: $(STAMP) ## What the tests of pages need, on Debian and Ubuntu: Chromium and Playwright
	apt-get update && apt-get install -y chromium
	$(PY) -m pip install --quiet --disable-pip-version-check playwright

clean: ## Remove the environment and all caches; runs/ and data/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find detector tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A working .venv is kept, so that another build of torch can be installed into it first (CONTRIBUTING.md).
# The stamp comes last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  command -v "$(PYTHON)" >/dev/null || \
	    { echo "error: $(PYTHON) is not installed. Name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$("$(PYTHON)" -V 2>&1)." \
	           "Name another: make PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "error: $(PYTHON) comes without venv; install it (Debian, Ubuntu: the package python3-venv)." >&2; exit 1; }; \
	  echo "[1/4] creating $(VENV) with $$("$(PYTHON)" -V)"; \
	  "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "[2/4] installing torch and what prediction needs (large: minutes on a slow line)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@echo "[3/4] installing what training and development need"
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[train,dev]'
	@echo "[4/4] trying it"
	@$(PY) -c 'import torch, torchvision, lightning, hydra, pycocotools, pytest, detector' || \
	  { echo "error: the installation is broken. Start again: make clean setup" >&2; exit 1; }
	@touch $(STAMP)
