PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo test test-all test-slurm test-oldest lint format check bench gpu stress clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

venv: $(STAMP)  ## Create .venv and install everything (a few minutes, about 8 GB with PyTorch's GPU libraries)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

demo: venv  ## Pre-train on the bundled digits, evaluate, draw plots (80 s to 4 minutes on 2 CPU cores)
	$(BIN)/python demo.py --output_dir output/demo

# Tests run in JOBS processes, of about 2 GB each; 0 for one after the other in pytest's own.
JOBS ?= 2
PYTEST := python -m pytest -q -n $(JOBS) --dist worksteal

test: venv  ## Run the quick tests (CPU, no network; 6 to 12 minutes on 2 cores, JOBS=2)
	$(BIN)/$(PYTEST) -m "not slurm and not slow"

test-all: venv  ## Run all tests but those for Slurm (20 to 35 minutes on 2 cores)
	$(BIN)/$(PYTEST) -m "not slurm"

test-slurm: venv  ## Run the tests that submit to a Slurm of two nodes (about 20 minutes; skipped where there is none)
	$(BIN)/python -m pytest -q -rs -m slurm

PYTHON_OLDEST ?= python3.11

test-oldest:  ## The quick tests with the oldest supported Python and packages, in .venv-oldest (about 8 GB)
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $$($(PYTHON_OLDEST) tests/oldest.py)
	.venv-oldest/bin/$(PYTEST) -m "not slurm and not slow"

lint: venv  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv  ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## What a change must pass

bench: venv  ## Measure speed against named peers; PHOTOS=folder of full-size images, SMALL=of 32-pixel ones (30 minutes)
	$(if $(and $(PHOTOS),$(SMALL)),,$(error make bench PHOTOS=FOLDER SMALL=FOLDER))
	$(BIN)/python benchmarks/throughput.py views --data_path $(PHOTOS)
	$(BIN)/python benchmarks/throughput.py cifar --data_path $(SMALL)
	$(BIN)/python benchmarks/throughput.py step
	$(BIN)/python benchmarks/throughput.py evaluation --data_path $(PHOTOS)
	$(BIN)/python benchmarks/growth.py --json output/growth.json --figure output/growth.png
	$(BIN)/python benchmarks/loss.py

gpu: venv  ## Check and time this GPU: does it compute what it should, and how fast (15 minutes; the same command goes on)
	$(BIN)/python benchmarks/gpu.py --json output/gpu.json

stress: venv  ## Inject faults, kill -9 to a full disk, hostile flags, files that lie (about 25 minutes)
	$(BIN)/python benchmarks/stress.py
	$(BIN)/python benchmarks/fuzz.py

clean:  ## Remove caches and the demo's output
	rm -rf output/demo .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
