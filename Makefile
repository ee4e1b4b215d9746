# `make demo` and `make test` need git, make and Python >= 3.11, nothing else.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
PY := .venv/bin/python
CHECK := $(PY) tools/check.py

.PHONY: help venv setup demo test test-all lint format docs bench-cpu wheel clean

help:
	@echo "make demo       set up, then run the main job: moesaic run"
	@echo "make test       set up, then lint, types and tests"
	@echo "make test-all   the same and everything slow: wheel, newest transformers, whole jobs"
	@echo "make lint | format | docs | bench-cpu | wheel | setup | clean"

venv:
	@test -n "$(PYTHON)" || { echo "moesaic needs Python 3.11 or newer; install it, or: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) tools/setup_env.py

setup:
	@$(PYTHON) tools/setup_env.py --retry

demo: venv
	@OMP_WAIT_POLICY=PASSIVE $(PY) -m moesaic run

test: venv
	@$(CHECK) lint types test

test-all: venv
	@$(CHECK) lint types test-all newest-transformers

lint: venv
	@$(CHECK) lint types

format: venv
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

docs: venv
	@$(CHECK) docs

bench-cpu: venv
	@$(PY) -m moesaic bench --suite cpu

wheel: venv
	@$(PY) -m build

clean:
	rm -rf build dist site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
