# Every target sets up what it needs in .venv, on a machine with Python 3.11+ and a C++ compiler; the second run is quick.
#   make demo          shrink a real sentence encoder to 7 MB and measure what is left
#   make test          the tests
#   make lint          ruff and pyright
#   make experiments   the measured pages of docs/results (hours; read the public data of PENNYWEIGHT_DATA)
#   make bench         the benchmark tables (the same)
#   make sanitize      the kernels' tests under the address and undefined-behaviour sanitizers
#   make emulate       the kernels' tests with AVX-512 and AMX emulated

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt
KERNEL_TESTS := $(wildcard tests/test_kernels_*.py) tests/test_error_feedback.py
# All that measure; `regularisers` then quotes their pages.
EXPERIMENTS := $(filter-out regularisers,$(basename $(notdir $(shell grep -l __main__ src/pennyweight/bench/experiments/*.py))))
NATIVE := CMakeLists.txt $(wildcard src/pennyweight/kernels/cpu/*)

.PHONY: demo test lint experiments bench emulate sanitize clean

demo: $(VENV)/.installed
	$(BIN)/pennyweight demo

# As many workers as there are cores, with one thread each.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

experiments: $(VENV)/.installed
	@set -e; for name in $(EXPERIMENTS) regularisers; do \
	  echo "== $$name"; $(BIN)/python -m pennyweight.bench.experiments.$$name; done

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/planner.py --page
	$(BIN)/python benchmarks/cost.py --page
	$(BIN)/python benchmarks/promise.py --page
	$(BIN)/python benchmarks/quality_minilm.py --page
	$(BIN)/python benchmarks/quality_cifar.py --page
	$(BIN)/python benchmarks/peers.py --with-pennyweight
	$(BIN)/python benchmarks/kernels.py --page
	$(BIN)/python benchmarks/kernels_binary.py --page
	$(BIN)/python benchmarks/kernels_sparse.py --page
	$(BIN)/python benchmarks/optimizers.py --page
	$(BIN)/python benchmarks/picture.py

# The kernels of every x86 instruction set, run by emulation on whatever processor there is (needs Debian's libsimde-dev).
emulate: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/emulated -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN))/python -DPENNYWEIGHT_EMULATED=ON
	$(BIN)/cmake --build build/emulated
	$(BIN)/python tests/other_build.py build/emulated/_cpu*.so $(KERNEL_TESTS)

# The kernels with every access and overflow checked (needs GCC's or Clang's sanitizers).
sanitize: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/sanitized -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN))/python -DPENNYWEIGHT_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitized
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python tests/other_build.py build/sanitized/_cpu*.so $(KERNEL_TESTS)

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
