# The two commands of the README, and what a developer needs besides.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-fast fuzz lint bench clean

demo: .venv/.run
	$(BIN)/edgekit compile mobileone_digits --target openvino --data digits --force

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

fuzz: .venv/.test
	$(BIN)/python -m tests.fuzz --runs 2000

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.test
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.light_networks

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "edgekit needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.made pyproject.toml constraints.txt
	@echo "installing edgekit and its pinned dependencies into .venv (minutes, once)"
	$(PIP) -e '.[openvino]'
	@touch $@

.venv/.test: .venv/.run pyproject.toml constraints.txt
	@echo "installing the test extras"
	$(PIP) -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
