# make train   trains LS-GAN-PG on the embedded faces into runs/ (installs into .venv first)
# make test    installs the development tools and runs every test
# make bench-check   has a change made anything slower? (a minute, on an idle machine)
# make lint    ruff, clang-format, mypy;   make format   applies the first two
# facenet-pytorch carries a file that is read, and asks for another torch: so without its dependencies.
# PYTHON and PIP_FLAGS may be given on the command line.

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt $(PIP_FLAGS)
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml gpkernels/_version.py

.PHONY: train test lint format bench-check clean

train: .venv/train
	$(BIN)/gpkernels train --preset ls-gan-pg-mini --data lfw-mini

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/shim -name '*.h' -o -name '*.c*')
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/shim -name '*.h' -o -name '*.c*')

bench-check: .venv/dev
	$(BIN)/python -m benchmarks.gate

clean:
	rm -rf .venv build dist *.egg-info gpkernels/*.so

# The package is built in place against the torch that is installed, so a change of the C++ rebuilds it alone.
.venv/train: $(NATIVE) .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch and building the kernels (about a minute)"
	$(PIP) torch setuptools ninja pybind11
	$(PIP) --no-build-isolation --editable '.[train]'
	touch $@

.venv/dev: .venv/train
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps facenet-pytorch
	touch $@
