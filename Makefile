# Common tasks; `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Modules are compiled when they are first imported, and kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo up topology unit test check format browser clean

help:  ## List the tasks
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP)  ## Create .venv with the command .venv/bin/deltadock

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[torch,embedded,benchmarks,dev]'
	@$(BIN)/python -c 'import deltadock.api.main, deltadock.inference.server, deltadock.workers.app'  # compiles what is used
	@touch $@

demo: install  ## Compress the sample fine-tune and compare it with its delta, in a few minutes
	$(BIN)/deltadock demo

up: install  ## Run all services on this machine; Ctrl-C stops them
	$(BIN)/deltadock up

topology: install  ## Like up, with real Postgres, Redis and S3 servers
	$(BIN)/deltadock topology

unit: install check  ## Run the checks and the quick tests, in under three minutes
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test: install browser check  ## Run the checks and the whole suite on real servers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

check: install  ## Check format, lint, types and import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

browser: install  ## Find or install a browser for the dashboard's tests
	$(BIN)/python -m tests.browser

clean:  ## Remove the environment, caches and embedded data
	rm -rf .venv .deltadock .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
