# Set-up, server, tests. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PORT ?= 8000
CONFIG ?= configs/demo-cpu.yaml
ARGS ?=
PIP_ARGS ?=

# Folders in which every test counts as marked `engine`.
ENGINES := $(addprefix tests/,e2e serving compat gpu)
# The other folders; in them, tests that start an engine are marked.
FAST := $(filter-out $(ENGINES),$(patsubst %/,%,$(sort $(dir $(wildcard tests/*/test_*.py)))))
# The other folders that have marked tests.
MARKED := $(addprefix tests/,evaluation examples plan server)

# Tests that need only vLLM's Python files; the ignored one needs a CPU kernel.
NEXT := $(addprefix tests/,contract scheduler worker server plan/test_model.py plan/test_plan_command.py) \
  --ignore tests/worker/test_rows.py

# Parts of `make test`.
PARTS ?= test-engines test-e2e test-serving test-fast

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# Without isolation, a package that has no wheel is built with the packages of the lock.
PIP = $(BIN)/python -m pip install $(PIP_ARGS) --no-deps --no-build-isolation

PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest

.PHONY: help setup serve test test-fast test-e2e test-serving test-engines test-next test-gpu soak check fmt docs notebooks lock dist clean

help: ## List the targets
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@printf '%s\n' '' \
	  'Variables: PYTHON (to make $(VENV) with), PIP_ARGS (for every pip install), PORT and CONFIG (of serve),' \
	  'ARGS (further arguments of serve or test): make serve PORT=9000 ARGS="--api-key secret"'

setup: $(STAMP) ## Make .venv with every dependency; does nothing until the lock or pyproject.toml changes

$(STAMP): $(addprefix requirements/,build.txt cpu.txt cpu-torch.txt) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	  f"vllm-l2kv needs Python 3.11 or 3.12, $(PYTHON) is {sys.version.split()[0]}; name another: make setup PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) --require-hashes -r requirements/build.txt
	$(PIP) --require-hashes -r requirements/cpu.txt
	$(PIP) -r requirements/cpu-torch.txt
	$(PIP) -e .
	@# A CUDA build of torch has the same version, so pip would keep it the next time: uninstall it.
	@$(BIN)/python -c 'import torch; raise SystemExit(3 if torch.version.cuda else 0)' || { \
	  test $$? = 3 || exit 1; \
	  $(BIN)/python -m pip uninstall --quiet --yes torch; \
	  printf '%s\n' '' 'pip installed a CUDA build of torch, and this set-up is for CPUs. Run' \
	    '    make setup PIP_ARGS="--extra-index-url URL"' \
	    'with the URL of the command that pytorch.org shows under Get Started for Linux, Pip and CPU.' >&2; \
	  exit 1; }
	$(BIN)/python -c 'from vllm.platforms import current_platform; assert current_platform.is_cpu(), current_platform'
	@touch $@

serve: setup ## Serve the demo model on port 8000, or another model with ARGS=MODEL
	$(BIN)/vllm-l2kv serve $(ARGS) --config $(CONFIG) --port $(PORT)

test: setup ## Run all tests, or those that ARGS names; those that need a GPU are skipped without one
	$(BIN)/vllm-l2kv demo-model
ifeq ($(ARGS),)
	@# Two at a time, the longest first. Three take longer on two cores: vLLM's processes spin while they wait.
	$(MAKE) --no-print-directory --jobs 2 --output-sync=line $(PARTS)
else
	$(PYTEST) -m "not slow" $(ARGS)
endif

test-fast: setup ## Run the tests that start no engine; before each commit
	$(BIN)/vllm-l2kv demo-model
	$(PYTEST) -m "not slow" --no-engines $(FAST) $(ARGS)

test-e2e: setup ## Run the tests with engines in pytest's own process
	$(BIN)/vllm-l2kv demo-model
	$(PYTEST) -m "engine and not slow" tests/e2e $(ARGS)

test-serving: setup ## Run the tests that ask servers
	$(BIN)/vllm-l2kv demo-model
	$(PYTEST) -m "engine and not slow" tests/serving $(ARGS)

test-engines: setup ## Run the other tests that start engines
	$(BIN)/vllm-l2kv demo-model
	$(PYTEST) -m "engine and not slow" $(filter-out tests/e2e tests/serving,$(ENGINES)) $(MARKED) $(ARGS)

test-next: setup ## Run the tests without compiled code on the newest supported vLLM, whose wheel it downloads once
	$(BIN)/vllm-l2kv demo-model
	vllm=$$($(BIN)/python scripts/next_vllm.py) && export PYTHONPATH=$$vllm VLLM_TARGET_DEVICE=cpu && \
	  $(PYTEST) -m "not slow" --no-engines $(NEXT) $(ARGS)

test-gpu: ## Run the tests that need a GPU, with a PYTHON that has vllm-l2kv[cuda,dev] installed
	$(PYTHON) -m pytest -m gpu tests/gpu tests/kernels $(ARGS)

soak: setup ## Send thousands of requests from clients that come and go, in a small cache, for ten minutes
	$(BIN)/vllm-l2kv demo-model
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m pytest tests/serving/test_churn.py -s --timeout 7200 --soak-requests 1000 $(ARGS)

check: setup ## Lint, format check, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fmt: setup ## Format, and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup ## Build the documentation into site/
	$(BIN)/python -m mkdocs build --strict

notebooks: setup ## Execute examples/notebooks, or ARGS=FILE, and write their outputs
	$(BIN)/vllm-l2kv demo-model
	$(BIN)/python scripts/notebooks.py $(ARGS)

lock: setup ## Write requirements/*.txt again, with the newest versions if ARGS=--upgrade
	$(BIN)/python scripts/lock.py $(ARGS)

dist: setup ## Build a source distribution and, from it, the wheel in dist/
	rm -rf dist
	$(BIN)/python -m uv build --no-config --no-build-isolation --python $(BIN)/python

clean: ## Remove .venv and everything that tools have made
	rm -rf $(VENV) build dist site node_modules *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
