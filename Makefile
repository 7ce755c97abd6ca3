# make test, make needle and make bench each set up what they need; nothing has to be installed by hand.
#   make setup PYTHON=python3.12                        another interpreter
#   make setup VENV_FLAGS=--system-site-packages        keep the torch that is installed, whatever its version (a GPU machine)
#   make setup PIP_FLAGS="--find-links wheels"          more options for pip install
PYTHON ?= python3
VENV_FLAGS ?=
PIP_FLAGS ?=
VENV := .venv
PY := $(VENV)/bin/python
# with the system's packages the pins would replace its torch
PINS := $(if $(findstring system-site-packages,$(VENV_FLAGS)),,-c constraints.txt)
# what is imported is compiled then, which is little of it
PIP := $(PY) -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_FLAGS) $(PINS)
SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
BUILD = $(PY) setup.py --quiet build_ext --inplace
INSTALLED := $(VENV)/.installed
LIBRARIES := build/.libraries
TEST_LIBRARIES := build/.test_libraries
ARGS ?=

.DEFAULT_GOAL := setup
.PHONY: setup needle test bench bench-gpu clean

setup: $(LIBRARIES)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer, got " + sys.version.split()[0] + "; make setup PYTHON=...")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PIP) "torch>=2.11" "setuptools>=77" wheel
	@# the libraries are built below, where unchanged objects are kept
	SPARSE_ATTN_BUILD=none $(PIP) --no-build-isolation -e ".[test,bench]"
	@touch $@

$(LIBRARIES): $(INSTALLED) $(SOURCES)
	$(BUILD)
	@touch $@

# besides, the AMX kernels on emulated tiles and the CUDA kernels on emulated threads, and for real where nvcc is
$(TEST_LIBRARIES): $(INSTALLED) $(SOURCES)
	SPARSE_ATTN_BUILD=default,emulated,cuda $(BUILD)
	@touch $@ $(LIBRARIES)

needle: $(LIBRARIES)
	$(PY) -m benchmarks.needle --prefill xattention --prefill auto $(ARGS)

test: $(TEST_LIBRARIES)
	@# a process per core, at most four, each with one thread but where a test sets more
	OMP_NUM_THREADS=1 $(PY) -m pytest python_tests -n auto --maxprocesses=4 --dist=worksteal --durations=15 --timeout=600 $(ARGS)

bench: $(LIBRARIES)
	@mkdir -p build/bench
	$(PY) -m benchmarks.kernels --json build/bench/kernels.jsonl $(ARGS)

# whatever the interpreter has must do, for a GPU machine may have nothing to download: the one that PYTHON= names, or that of
# $(VENV), or python3
bench-gpu:
	@PYTHONPATH=. $(if $(filter file,$(origin PYTHON)),$(if $(wildcard $(INSTALLED)),$(PY),$(PYTHON)),$(PYTHON)) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build sparse_attn/_native kvcache/tiers/_host*.so *.egg-info .pytest_cache
	find benchmarks kvcache python_tests sparse_attn -name __pycache__ -type d -exec rm -rf {} +
