PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# torch goes first: with it in place, the packages that ask for it do not fetch the CUDA build on a CPU machine.
$(VENV)/ready: pyproject.toml kernels/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ./kernels --editable '.[dev]'
	touch $@

.PHONY: install demo test test-full kernels-report lint format clean
install: $(VENV)/ready

demo: $(VENV)/ready
	$(BIN)/python -m megapd demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not full"

test-full: $(VENV)/ready
	$(BIN)/python -m pytest

# Registers, shared memory and spills of the Triton kernels, compiled for GPUs that need not be there.
kernels-report: $(VENV)/ready
	$(BIN)/python benchmarks/kernels_report.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy megapd kernels/megapd_kernels

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
