# make quickstart: train on real images with wrong labels.  make test: the tests.  make test-all: every method in every variant.
# make browser: the report of an audit in a real headless Chromium (Debian's package chromium; skipped without it).
# make check: tests, ruff, types.
# make tables: write the tables of README.md and docs/ from results/.  make docs: build the documentation into site/.
# make bench: the speed of every part, as ratios (a quarter of an hour on 2 cores).
# Each does all the set-up it needs: a virtual environment in .venv with everything installed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The tests start many processes, which compile every module again where Python is told not to write bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all browser check lint bench tables docs clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --ignore tests/browser

test-all: $(VENV)/.test
	SANM_TESTS=all $(BIN)/python -m pytest -n 2 --ignore tests/browser

browser: $(VENV)/.test
	$(BIN)/python -m pytest tests/browser

check: test lint

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

tables: $(VENV)/.installed
	$(BIN)/python scripts/tables.py

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch and torchvision in one command, so that their builds fit each other
$(VENV)/.installed: $(VENV)/.python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch torchvision -e '.[pretrained,study]'
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[pretrained,study,test,docs]'
	touch $@

$(VENV)/.check: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[pretrained,study,test,docs,check]'
	touch $@

clean:
	rm -rf $(VENV) site build dist *.egg-info
