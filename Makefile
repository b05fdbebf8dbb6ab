# Each target sets up what it needs in .venv, and again only when the dependencies change.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-matrix check docs bench dist results-check clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := mmdefense tasks/mmdefense_tasks adapters/mmdefense_adapters $(wildcard gallery/*.py recipes/*.py recipes/analyses/*.py recipes/benchmarks/*.py)
# The first of these that pyproject.toml admits makes the environment.
PYTHONS ?= python3 python3.13 python3.12 python3.11
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
# One thread per process: two test processes on two cores would otherwise fight for them.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PROCESSES ?= 2
# Neighbours share what their module prepares: a process keeps them, and gives away what is left.
SHARED := -n $(PROCESSES) --dist worksteal
# Bytecode is kept: without it, each process that a test starts compiles PyTorch again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
# The oldest versions of all dependencies, newer Pythons, and the tests that they must pass.
FLOOR := $(VENV)/floor
NEWER ?= python3.12 python3.13
MATRIX := tests/hostile tests/checkpoints tests/scanning/test_files.py \
  $(addprefix tests/adapters/test_,detection.py images.py language.py processors.py) \
  --deselect tests/adapters/test_detection.py::test_the_loss_can_be_differentiated_twice'[rt-detr]'

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## install mmdefense and its tools into .venv

$(READY): pyproject.toml constraints.txt
	@for python in $(PYTHONS); do \
	  if "$$python" -c '$(FITS)' 2>/dev/null; then fit=$$python; break; fi; \
	done; \
	if [ -z "$$fit" ]; then \
	  echo "mmdefense needs Python 3.11, 3.12 or 3.13, and none of these is one: $(PYTHONS); install one, or name it: make PYTHONS=/path/to/python3.12" >&2; \
	  exit 3; \
	fi; \
	echo "setup: installing into $(VENV) with $$("$$fit" --version); minutes on a first run, torch is large"; \
	"$$fit" -m venv $(VENV)
	@# uv installs in seconds what takes pip minutes; where it is not to be had, pip does it.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv \
	  && UV_HTTP_TIMEOUT=$${UV_HTTP_TIMEOUT:-180} VIRTUAL_ENV=$(VENV) \
	     $(BIN)/uv pip install --quiet -c constraints.txt -e ".[dev]" \
	  || { echo "uv could not install mmdefense; pip tries it now" >&2; \
	       $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"; }
	@touch $@

demo: $(READY)  ## plant a backdoor, remove it by each defense, write out/demo/report.html
	@$(BIN)/mmdefense demo -o out/demo --force $(ARGS)
	@echo "demo: open out/demo/report.html in a browser"

test: $(READY)  ## run the tests
	@$(ONE_THREAD) $(BIN)/pytest $(SHARED) $(ARGS)

test-slow: $(READY)  ## run the tests that take minutes each, which make test leaves out
	@MMDEFENSE_SLOW=1 $(ONE_THREAD) $(BIN)/pytest $(SHARED) -m slow $(ARGS)

test-matrix: $(READY)  ## load models and refuse hostile files with the oldest versions, and on newer Pythons
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(FLOOR)
	@UV_HTTP_TIMEOUT=$${UV_HTTP_TIMEOUT:-180} VIRTUAL_ENV=$(FLOOR) \
	  $(BIN)/uv pip install --quiet --resolution lowest-direct -e ".[dev]"
	@$(ONE_THREAD) $(FLOOR)/bin/pytest $(SHARED) $(MATRIX) $(ARGS)
	@for python in $(NEWER); do \
	  if ! "$$python" -c '' 2>/dev/null; then echo "test-matrix: $$python is not installed, left out"; continue; fi; \
	  echo "test-matrix: $$("$$python" --version)"; \
	  $(BIN)/uv venv --quiet --allow-existing --python "$$(command -v "$$python")" $(VENV)/newer/$$python && \
	  UV_HTTP_TIMEOUT=$${UV_HTTP_TIMEOUT:-180} VIRTUAL_ENV=$(VENV)/newer/$$python \
	    $(BIN)/uv pip install --quiet -c constraints.txt -e ".[dev]" && \
	  $(ONE_THREAD) $(VENV)/newer/$$python/bin/pytest $(SHARED) $(MATRIX) $(ARGS) || exit 1; \
	done

check: $(READY)  ## lint, types, and the arrows between the packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict $(PACKAGES)
	@$(BIN)/lint-imports --no-logo

docs: $(READY)  ## build the site of the documents into out/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open out/site/index.html in a browser"

bench: $(READY)  ## measure the kernels against plain versions, write out/bench
	@$(BIN)/python recipes/bench.py -o out/bench $(ARGS)

dist: $(READY)  ## build the distributions, and check them as the package index does
	@rm -rf dist
	@$(BIN)/uv build --quiet
	@$(BIN)/uv tool run twine check --strict dist/*

results-check: $(READY)  ## measure three random cells of the published tables again: minutes to hours
	@$(BIN)/python recipes/results.py check $(ARGS)

clean:  ## remove .venv and the tools' caches; out/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
