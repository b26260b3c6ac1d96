PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 3

# torch goes first: with it in place, the packages that ask for it do not fetch the CUDA build on a CPU machine.
$(VENV)/ready: pyproject.toml kernels/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ./kernels --editable '.[dev]'
	touch $@

.PHONY: install demo test test-fast test-full test-harness test-peers kernels-report lint format clean
install: $(VENV)/ready

demo: $(VENV)/ready
	$(BIN)/python -m megapd demo

# By file, so that what a file's tests share is made once; three workers for two cores, because many tests wait.
test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not full" -n $(WORKERS) --dist loadfile

test-full: $(VENV)/ready test-harness
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# What starts no process, no service, no browser and no Triton interpreter.
test-fast: $(VENV)/ready
	$(BIN)/python -m pytest -m "not full and not slow" -n 2 --dist worksteal

# The libraries that megapd_kernels.compat stands in for, in an environment of their own.
test-peers: .venv-peers/ready
	MEGAPD_PEERS=required .venv-peers/bin/python -m pytest -q -p no:cacheprovider tests/peers

.venv-peers/ready: tests/peers/requirements.txt kernels/pyproject.toml
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0
	.venv-peers/bin/pip install --quiet --requirement tests/peers/requirements.txt --editable ./kernels
	touch $@

# lm-eval on exported students, in an environment of its own.
test-harness: .venv-harness/ready
	REQUIRE_LM_EVAL=1 .venv-harness/bin/python -m pytest -q -p no:cacheprovider tests/harness

.venv-harness/ready: tests/harness/requirements.txt pyproject.toml kernels/pyproject.toml
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/pip install --quiet torch==2.13.0
	.venv-harness/bin/pip install --quiet --requirement tests/harness/requirements.txt --editable ./kernels --editable .
	touch $@

# Registers, shared memory and spills of the Triton kernels, compiled for GPUs that need not be there.
kernels-report: $(VENV)/ready
	$(BIN)/python benchmarks/kernels_report.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-peers .venv-harness build *.egg-info .pytest_cache .mypy_cache .ruff_cache
