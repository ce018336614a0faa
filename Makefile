# One verb per chore. `make` alone lists them.
#   JOBS=2   test processes         ARGS=…   passed on to the command of demo, test and bench
#   BENCH=…  which of memory_speed and decode_speed to run; both by default
SHELL := /bin/bash
BIN   := .venv/bin
STAMP := .venv/.setup-done
JOBS  ?= 2
ARGS  ?=
BENCH ?= memory_speed decode_speed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check check-deep bench docs

help: ## list the chores
	@echo "Nestling. First time here? make demo"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install Nestling into it (again only when pyproject.toml or constraints.txt changed)

# Any Python the pinned PyTorch has a build for will do; running it is the test, as a shim may name one that is absent.
$(STAMP): pyproject.toml constraints.txt
	@set -eu; \
	if ! [ -x $(BIN)/pip ]; then \
	  python=; \
	  for candidate in $${PYTHON:-} python3 python3.13 python3.12 python3.11; do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; \
	    then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make setup: no Python 3.11 to 3.14 with the venv module was found (looked for: $${PYTHON:-} python3 python3.13 python3.12 python3.11)." >&2; \
	    echo "Install one (on Debian and Ubuntu: python3 and python3-venv), or name yours: make setup PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$($$python --version)"; \
	  $$python -m venv .venv; \
	fi; \
	echo "Installing into .venv (PyTorch is large: the first time takes some minutes)"; \
	$(BIN)/pip install $$(test -t 2 || echo -q) --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $@

demo: setup ## train Hope on real text for about three minutes, then show what makes it different
	@$(BIN)/nestling demo $(ARGS)

# One thread a process: on the tests' tiny tensors more threads only wait for each other.
test: setup ## run the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal $(ARGS)

check: setup ## lint, formatting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check-deep: setup ## the property tests with many more, random examples (long)
	@NESTLING_DEEP=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal $(ARGS)

bench: setup ## speed and memory of the memory layers beside attention
	@set -e; for bench in $(BENCH); do $(BIN)/python benchmarks/$$bench.py $(ARGS); done

docs: setup ## make docs/papers from the code, run every example of README.md and docs/, and follow their links
	@$(BIN)/python docs/generate.py
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/test_docs.py $(ARGS)
