# make train   a virtual environment, the installation, and the main job
# make test    the same for the tests
# make test-all  and all combinations of which that has a covering few
# make test-gpu  compiles attention and a training step for a GPU that need not be there: installs JAX's CUDA plugin (5 GB)
# make prove   kills, damages and moves a small run, and shows that it ends the same
# make check   format, lint, types
# make bench   the benchmarks, one JSON line each
# PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt
WORKERS ?= 2

.PHONY: train test test-all test-gpu prove check bench clean

train: $(VENV)/installed
	$(BIN)/python train.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25 $(TESTS)

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "exhaustive or not exhaustive" $(TESTS)

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[cuda12]'
	$(BIN)/python -m pytest -m gpu -rs tests/ops tests/planning

prove: $(VENV)/installed
	$(BIN)/python -m transformer prove

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/installed
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/decode.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info
