# Two commands do everything: `make demo` and `make test`. Both make .venv first.
#
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"   CPU builds of torch and torchvision (see README)

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
PIP_ARGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test lint types unit install clean

demo: install
	$(BIN)/mmkit demo --out $(OUT)

test: lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/python -m pytest

install: $(STAMP)

# Installed again only when the dependencies change.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mmkit needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
