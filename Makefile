# Each target makes the environment it needs; PYTHON chooses the interpreter, VENV the folder.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY) ## the whole paper in miniature, from rendering to aligned generators: runs/demo/report.html
	$(BIN)/videoalign demo --out runs/demo

test: $(READY) ## all tests, a file at a time on each core
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY) ## style and names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(READY) ## the site: site/index.html (its search needs a server: python -m http.server --directory site)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet  # the extra `docs` keeps MkDocs below 2

bench: $(READY) ## performance, as ratios measured in one run
	$(BIN)/python benchmarks/ratios.py

wheel: $(READY) ## dist/*.whl
	$(BIN)/python -m build --wheel

.PHONY: help demo test lint docs bench wheel
