# Every target bootstraps .venv from requirements.lock; an interrupted install is simply run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FAST := not slow and not gpu and not browser
SLOW := slow and not gpu and not browser
export UV_LINK_MODE ?= copy
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test test-cluster check format bench shots lock clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## .venv with everything (about 6 GB)

# The stamp is written last: without it the next `make` installs what is missing. Bytecode is compiled
# here, once, rather than by the first worker of every kind.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) tools/preflight.py
	@command -v uv >/dev/null || $(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv
	@UV=$$(command -v uv || echo "$(PYTHON) -m uv"); \
	test -x $(BIN)/python || $$UV venv --quiet --python $(PYTHON) $(VENV); \
	$$UV pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock && \
	$$UV pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## synthetic hospital and the real MIMIC demo patients, raw tables to reports
	$(BIN)/rayfuse demo

check: $(STAMP)  ## ruff, formatter, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

test: check  ## everything that needs no cluster, one representative of each mechanism
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not ray and $(FAST)"
	$(BIN)/pytest -m "ray and $(FAST)"

test-cluster: $(STAMP)  ## the matrices and full-size runs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not ray and $(SLOW)"
	$(BIN)/pytest -m "ray and $(SLOW)"

bench: $(STAMP)  ## benchmarks, JSON into benchmarks/results/
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

shots: $(STAMP)  ## the report in a real headless Chromium, desktop and phone width, into shots/
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { echo "no Chromium here: install it first, e.g. apt-get install chromium"; exit 1; }
	$(BIN)/pytest -m browser

format: $(STAMP)  ## mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## requirements.lock from pyproject.toml
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-emit-index-url \
	  --no-header pyproject.toml -o requirements.lock

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
