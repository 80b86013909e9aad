# Bootstraps the environment and names the targets; Snakemake (Snakefile) does the work.
#   make reproduce              train, quantize, measure, run every notebook, compare   (SCALE=pocket, CORES=: what is allowed)
#   make test                   checks, the test suite, a whole study at scale smoke   (PYTHON=python3.13: on that one)
#   make test-all               the same with every fault and every architecture, of which make test takes a sample
#   make test-fast              the tests that take less than a minute in all
#   make check                  ruff and mypy alone
#   make bench                  the benchmarks (ONLY="training optimizers"): their table, and that of docs/speed.md; a busy machine writes none (FORCE=1: all the same)
#   make figures SCALE=laptop   figures and pages again from the tables of a scale; trains nothing, changes no table
#   make continue SCALE=confirm as far as the time reaches: committed rows count as done   (HOURS=, SHARD=1/3)
#   make publish SCALE=laptop   move the tables of your runs over the committed ones (PARTIAL=1: although incomplete)
#   make site                   README, docs and committed pages as a web site in site/, without a network
#   make verify                 every committed table and page against its checksum; with SCALE=pocket also its runs, a few trained anew
#   make compare OPTIMIZER=module:Class   an optimizer from outside compared with the six at SCALE   (HYPER=, RATES=, NAME=)
#   make plan SCALE=laptop      what a scale runs, how much is done, how long the rest takes
#   make lock                   environment.lock, the same versions with hashes, again from environment.yml (needs uv)
#   make env | make hooks       the environment in .venv | checks before every commit (pre-commit), once a clone
#   make lab                    JupyterLab (OPTIONS=--no-browser)
#   make clean | make distclean remove what can be made again | the environment and downloads, too

SCALE  ?= pocket
PYTHON ?= python3
VENV   := .venv
JOBS    = $(if $(CORES),--jobs $(CORES))
# The variables of the command line; another word there is misspelt, and would mean nothing.
VALID  := SCALE CORES HOURS SHARD PARTIAL RUNS EXECUTOR GPUS OPTIONS OPTIMIZER HYPER RATES NAME ONLY FORCE PYTHON \
	OMP_NUM_THREADS TOKENIZERS_PARALLELISM SHELL
GIVEN  := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
ifneq ($(filter-out $(VALID),$(GIVEN)),)
  $(error unknown variable $(filter-out $(VALID),$(GIVEN)); valid: $(VALID))
endif
# A Python that is named, of another version than the environment that is there, has a separate one.
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifeq ($(origin PYTHON),command line)
  ifneq ($(filter-out $(call version,$(PYTHON)),$(call version,.venv/bin/python)),)
    VENV := .venv-$(call version,$(PYTHON))
  endif
endif
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Test files side by side, one to four at a time; see tests/conftest.py for which files share a worker, and in which order.
PYTEST  = $(BIN)/python -m pytest -n auto --maxprocesses 4

# One worker thread a process: parallelism comes from running jobs side by side.
export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED  := 0
export TOKENIZERS_PARALLELISM ?= true

.DEFAULT_GOAL := help
.PHONY: help env reproduce continue compare figures publish site verify plan check test test-all test-fast bench lock hooks lab clean distclean

help:
	@sed -n 's/^#   //p' Makefile

env: $(READY)

# The pip section of environment.yml, line by line, so that conda and pip users get the same versions.
$(READY): environment.yml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed -n 's/^      - \([^ ].*\)/\1/p' environment.yml > $(VENV)/pins.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/pins.txt
	touch $@

reproduce: $(READY)
	@$(BIN)/beyond-outliers reproduce --scale $(SCALE) $(JOBS) \
		$(if $(EXECUTOR),--executor $(EXECUTOR)) $(if $(GPUS),--gpus $(GPUS)) $(if $(OPTIONS),--options="$(OPTIONS)")

figures: $(READY)
	$(BIN)/beyond-outliers figures --scale $(SCALE) $(JOBS)

publish: $(READY)
	$(BIN)/beyond-outliers claims --scale $(SCALE)
	$(BIN)/beyond-outliers publish --scale $(SCALE) $(if $(filter-out 0 no false,$(PARTIAL)),--partial)

site: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . site
	@echo "open site/index.html"

continue: $(READY)
	$(BIN)/beyond-outliers continue --scale $(SCALE) $(JOBS) $(if $(HOURS),--hours $(HOURS)) $(if $(SHARD),--shard $(SHARD))

verify: $(READY)
	@$(BIN)/beyond-outliers verify \
		$(if $(filter command environment,$(firstword $(origin SCALE))),--scale $(SCALE)) $(if $(RUNS),--runs $(RUNS))

compare: $(READY)
	$(BIN)/beyond-outliers compare --scale $(SCALE) --optimizer "$(OPTIMIZER)" \
		$(if $(HYPER),--hyper "$(HYPER)") $(if $(RATES),--rates $(RATES)) $(if $(NAME),--name $(NAME))

plan: $(READY)
	@$(BIN)/beyond-outliers plan --scale $(SCALE)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not exhaustive"

test-all: check
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow and not exhaustive"

bench: $(READY)
	$(BIN)/python tests/benchmarks/bench.py $(if $(ONLY),--only $(ONLY)) $(if $(filter-out 0 no false,$(FORCE)),--force)

# The same versions with their hashes, for Linux and macOS; needs uv. Installed by: pip install --require-hashes -r environment.lock
lock:
	sed -n 's/^      - \([^ -].*\)/\1/p' environment.yml | uv pip compile --quiet --universal --generate-hashes \
		--python-version 3.11 --no-emit-index-url --no-annotate --no-header --output-file environment.lock -

hooks: $(READY)
	$(BIN)/pre-commit install

lab: $(READY)
	$(BIN)/jupyter lab --config=notebooks/jupyter_lab_config.py $(if $(filter 0,$(shell id -u)),--allow-root) $(OPTIONS)

clean:
	rm -rf data/runs data/cache/corpus data/cache/compiled .snakemake .pytest_cache .ruff_cache .mypy_cache

distclean: clean
	rm -rf .venv .venv-3.* data/cache *.egg-info lib/*.egg-info
