# Targets; `make help` prints them. Options of demo: DATA=digits|fashion-mnist|cifar100, DATA_DIR=...
PYTHON ?= $(shell for v in python3.13 python3.12 python3.11 python3; do command -v $$v >/dev/null && $$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$v && break; done)
VENV   ?= .venv
BIN     = $(VENV)/bin
DATA   ?= digits
OUT    ?= demo/$(DATA)
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast bench bench-gpu lint format docs check-release install install-dev clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(VENV)/.made: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "codistill needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.made-dev: $(VENV)/.made
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

install: $(VENV)/.made  ## make the environment
install-dev: $(VENV)/.made-dev  ## make the environment with what tests and linters need

demo: install  ## install, then train peers on real images and print what they gain
	$(BIN)/codistill demo --data $(DATA) --out $(OUT) $(if $(DATA_DIR),--data-dir $(DATA_DIR))

lint: install-dev  ## ruff, import layers and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyrefly check

test: lint  ## install, lint, type-check, and run all tests
	$(BIN)/python -m pytest -n 2 --dist loadscope

test-fast: install-dev  ## run the quick tests alone
	$(BIN)/python -m pytest -n 2 --dist loadscope -m 'not slow'

format: install-dev  ## format the code and sort its imports
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: install  ## install, then measure the hot path against the published shape, as ratios
	$(BIN)/python benchmarks/hotpath.py

bench-gpu: install  ## install, then measure the training step on an NVIDIA GPU
	$(BIN)/python benchmarks/gpu.py

docs: install-dev  ## build the documentation site into build/docs; warnings are errors
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs

check-release: docs  ## build wheel, sdist and site, and use the installed wheel
	rm -rf build/release
	$(BIN)/python -m build --no-isolation --outdir build/release . >/dev/null
	$(BIN)/python benchmarks/check_release.py build/release

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) demo build
