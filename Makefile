# make train   .venv, install, and a small GraniteMoe trained on this machine
# make test    .venv, install with the test extra, and the default test suite
# make test-slow    the tests that the default suite leaves out
# make lint    ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run test files beside each other, one thread each; 0 runs them all in one.
WORKERS := 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

.PHONY: train test test-slow lint clean

train: $(VENV)/.installed
	$(BIN)/accelerate launch train.py +experiment=quickstart

test: $(VENV)/.installed-test
	$(PYTEST)

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m "slow and not gpu"

lint: $(VENV)/.installed-dev
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

clean:
	rm -rf $(VENV) build dist *.egg-info
