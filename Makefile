# Every target builds the environment it needs, once, and reuses it while the pins below are unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUDGET ?= short
PINS := constraints.txt pyproject.toml
# The names of the environment's stamps hold a hash of the pins: another hash, another stamp, a new environment.
PINS_HASH := $(shell cat $(PINS) | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(PINS_HASH)

ifeq ($(filter $(BUDGET),short long),)
  $(error BUDGET is short or long, not '$(BUDGET)')
endif

.DEFAULT_GOAL := help
.PHONY: help environment quickstart test test-all check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environment: $(STAMP) ## install the pinned environment into .venv

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lightning-echat needs Python 3.11 or later; name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@echo "environment: installing the pinned packages into $(VENV) (about 3 minutes and 5 GB, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check \
	  -c constraints.txt -e '.[synthesis,recogniser,sweep,cosyvoice,s3,dev]'
	@# W&B's search engine asks for numpy<2 and works with newer ones: its own demands are left out.
	@$(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check \
	  -c constraints.txt --no-deps sweeps
	@rm -f $(VENV)/.installed-*
	@touch $@
	@echo "environment: ready"

quickstart: $(STAMP) ## corpus, three stages, evaluation and report on this machine's CPU (BUDGET=long: 40 minutes)
	@$(BIN)/echat run experiments/quickstart/recipe.yaml $(if $(filter long,$(BUDGET)),--set budget=long)

test: $(STAMP) ## the test suite, without what takes long (7 minutes on two cores)
	@# Two tests at a time. Time limits are for a machine that does nothing else: what failed is run again, alone.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 || { [ $$? = 1 ] && $(BIN)/python -m pytest --last-failed; }

test-all: $(STAMP) ## the whole test suite
	@$(BIN)/python -m pytest -m 'slow or not slow'

check: $(STAMP) ## lint, format, types and import directions
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports
