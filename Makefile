# `make help` lists the targets. Each makes its virtual environment in .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run test files beside each other, one thread each; 0 runs them all in one.
WORKERS := 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help train test test-slow gpu lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed  ## install, and train the quickstart: a small GraniteMoe, on this machine
	$(BIN)/accelerate launch train.py +experiment=quickstart

test: $(VENV)/.installed-test  ## the default test suite
	$(PYTEST)

test-slow: $(VENV)/.installed-test  ## the tests marked slow
	$(PYTEST) -m "slow and not gpu"

gpu: $(VENV)/.installed-test  ## what only a GPU can show, in at most 9 minutes: benchmarks/gpu.json and gpu.md
	$(BIN)/python -m powertrain.launch.bench.gpu benchmarks

lint: $(VENV)/.installed-dev  ## ruff, ruff format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-test

clean:  ## remove .venv and build files
	rm -rf $(VENV) build dist *.egg-info
