# make demo     install, then train peers on real images and print what it buys (DATA=digits|fashion-mnist|cifar100, DATA_DIR=...)
# make test     install, then lint, type-check and test
# make bench    install, then measure the hot path against the published shape: ratios, in about 7 minutes
# make clean    remove the environment and what the demo wrote
PYTHON ?= $(shell for v in python3.13 python3.12 python3.11 python3; do command -v $$v >/dev/null && $$v -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$v && break; done)
VENV   ?= .venv
BIN     = $(VENV)/bin
DATA   ?= digits
OUT    ?= demo/$(DATA)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test bench lint install install-dev clean

$(VENV)/.made: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "codistill needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.made-dev: $(VENV)/.made
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@

install: $(VENV)/.made
install-dev: $(VENV)/.made-dev

demo: install
	$(BIN)/codistill demo --data $(DATA) --out $(OUT) $(if $(DATA_DIR),--data-dir $(DATA_DIR))

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyrefly check

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadscope

bench: install
	$(BIN)/python benchmarks/hotpath.py

clean:
	rm -rf $(VENV) demo
