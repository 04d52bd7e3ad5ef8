# What a person runs while working on the package; CONTRIBUTING.md says when.
PYTHON ?= .venv/bin/python

.PHONY: test-fast test lint
test-fast: # what an edit may break, in two minutes
	$(PYTHON) -m pytest -m "not slow"

test: # everything, also what starts processes
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
