# Everything runs in .venv, which is made on first use and again when pyproject.toml changes.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint types docs format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## run the quickstart; ARGS="..." are its options
	$(BIN)/python examples/quickstart.py $(ARGS)

test: $(STAMP) ## run the tests in WORKERS processes; ARGS="..." are pytest's options, e.g. ARGS=--cov
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(STAMP) ## check style, format and the order of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(STAMP) ## check types
	$(BIN)/mypy

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/mkdocs build --strict

format: $(STAMP) ## sort imports and format, in place
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

clean: ## delete what the tools made, but not .venv
	rm -rf build dist site htmlcov .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -U pip
	$(BIN)/python -m pip install -q -e '.[dev,docs]'
	@touch $@
