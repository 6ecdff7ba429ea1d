# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
# VENV may point anywhere; CI keeps it outside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
PINS := constraints.txt
STAMP := $(VENV)/.installed-$(shell sha256sum $(PINS) | cut -c1-16)
PYTEST := PYTHONSAFEPATH=1 $(BIN)/python -P -m pytest
# Processes of `make test-fast`, each with whole files of tests.
JOBS ?= 2

.PHONY: help demo test test-fast test-servers test-slow test-gpu bench-kernels bench-gpu lint types docs wheel release pins install clean

help:
	@echo "make demo       serve a small MoE model on CPU through the plugin and check it against the host"
	@echo "make test       the whole CPU test suite"
	@echo "make test-fast  without real servers; make test-servers: them alone"
	@echo "make test-slow  property tests at full size, older hosts"
	@echo "make lint       formatting, lint, types"
	@echo "make docs       tables that stand for code and records; make release: build, check and tag a version"

# About 11 GB: SGLang pins CUDA builds of torch, also where there is no GPU.
$(STAMP): $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(PINS) setuptools wheel
	$(BIN)/python -m pip install --progress-bar off --quiet -c $(PINS) "sglang==0.5.23" \
	    build hypothesis matplotlib mypy pre-commit pytest pytest-timeout pytest-xdist ruff
	touch $@

# Editable installs are cheap and always redone: the environment may be shared by checkouts.
install: $(STAMP)
	@if $(BIN)/python -m pip show --quiet moe-plugin 2>/dev/null; then \
	    $(BIN)/python -m pip uninstall --quiet --yes moe-plugin; fi # its name until 0.1.0
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check \
	    -e . -e tests/cpu_platform 2>&1 | { grep -i error || true; }

demo: install
	cd tests/support && $(BIN)/python -m serving.demo

test: test-fast test-servers

test-fast: install
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not gpu and not slow and not server"

# One after another: a server of two ranks takes two cores.
test-servers: install
	$(PYTEST) -m "server and not gpu and not slow"

test-slow: install
	$(PYTEST) -m "slow"

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(MAKE) types

# On an installed copy: mypy does not see the package mapping of an editable install.
types: install
	rm -rf $(VENV)/types && $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
	    --disable-pip-version-check --target $(VENV)/types . 2>&1 | { grep -i error || true; }
	cd tests && MYPYPATH=$(abspath $(VENV))/types $(BIN)/python -P -m mypy \
	    --config-file ../pyproject.toml -p moe_plugin

# On a GPU; results as JSON below benchmarks/results.
bench-kernels: install
	cd benchmarks/kernels && $(BIN)/python bench.py check --out ../results
	cd benchmarks/kernels && $(BIN)/python bench.py bars --out ../results
	cd benchmarks/kernels && $(BIN)/python bench.py compile --out ../results

bench-gpu: install
	$(BIN)/python -P benchmarks/serving/bench.py start --out benchmarks/results
	$(BIN)/python -P benchmarks/serving/bench.py pair --budget 3600 --out benchmarks/results
	$(BIN)/python -P benchmarks/transport/bench.py --out benchmarks/results

test-gpu: install
	$(PYTEST) -m gpu

# Tables of documents that stand for code or records.
docs: install
	cd tests/support && $(BIN)/python -m document_tables

wheel: install
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

release:
	PYTHON=$(PYTHON) .ci/release

pins: install
	{ sed -n '/^#/p' $(PINS); $(BIN)/python -m pip freeze --all --exclude-editable \
	    | grep -v -E '^pip=| @ '; } > $(PINS).new && mv $(PINS).new $(PINS)

clean:
	rm -rf build dist *.egg-info tests/*/*.egg-info
