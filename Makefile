# Every target sets up what it needs in .venv, on a machine with Python 3.11+ and a C++ compiler; the second run is quick.
#   make demo          shrink a real sentence encoder to 7 MB and measure what is left
#   make test          the tests
#   make lint          ruff and pyright
#   make experiments   the measured pages of docs/results (hours; read the public data of PENNYWEIGHT_DATA)
#   make bench         the benchmark tables (the same)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt
NATIVE := CMakeLists.txt $(wildcard src/pennyweight/kernels/cpu/*)

.PHONY: demo test lint experiments bench clean

demo: $(VENV)/.installed
	$(BIN)/pennyweight demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

experiments: $(VENV)/.installed
	@set -e; for file in src/pennyweight/bench/experiments/[a-z]*.py; do \
	  name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m pennyweight.bench.experiments.$$name; done

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/planner.py --page
	$(BIN)/python benchmarks/cost.py --page
	$(BIN)/python benchmarks/promise.py --page
	$(BIN)/python benchmarks/quality_minilm.py --page
	$(BIN)/python benchmarks/quality_cifar.py --page
	$(BIN)/python benchmarks/peers.py --with-pennyweight
	$(BIN)/python benchmarks/picture.py

clean:
	rm -rf $(VENV) build demo-out

# torch first and by itself: the rest then finds it installed. PENNYWEIGHT_TORCH_INDEX may name an index with the CPU
# build, which is a tenth of the size.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=...") if sys.version_info < (3, 11) else 0'
	@echo "Setting up $(VENV), once"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(PENNYWEIGHT_TORCH_INDEX),--index-url $(PENNYWEIGHT_TORCH_INDEX)) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) -e ".[dev]"
	@touch $@
