# Every target sets up .venv on first use, and again when pyproject.toml changes. The gate is `make lint type test`.

PYTHON ?= python3
# Settings of `make demo`; what is empty is left to `tessera demo`.
MINUTES ?=
OUT ?=
FRESH ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format type bench clean

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED) ## train on built-in scenes, generate, report: out/demo/report.html [MINUTES=8 OUT=out/demo FRESH=1]
	$(BIN)/tessera demo $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out "$(OUT)") $(if $(FRESH),--fresh)

test: $(INSTALLED) ## run the tests
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter tests/transformer/kernels

lint: $(INSTALLED) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED) ## format the code and mend what the linter can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(INSTALLED) ## check the types
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

bench: $(INSTALLED) ## run every benchmark in its quick form: out/bench/*.json
	@for file in $$(grep -l __main__ benchmarks/*.py); do \
		name=$$(basename $$file .py); \
		$(BIN)/python -m benchmarks.$$name --quick --out out/bench/$$name.json || exit 1; done

clean: ## remove .venv and every cache; out/ and runs/ stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Tessera needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version 2>&1`; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable '.[dev]'
	@touch $@
