# make setup | quickstart | test | test-all | test-cluster | lint | schema | recipes-table | layouts-table | bench |
# performance. PYTHON chooses the interpreter of .venv.

PYTHON ?= python3
BIN := .venv/bin
# .venv is ready for the dependencies as they now stand; by content, for a checkout has times of its own
READY := .venv/.ready-$(shell sed '/^\[tool/,$$d' pyproject.toml | cat - constraints.txt | cksum | cut -d' ' -f1)

SLURM := slurmctld slurmd slurm-client munge iproute2

.DEFAULT_GOAL := help
.PHONY: help setup install quickstart test test-all test-long test-cluster lint schema recipes-table layouts-table bench performance

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY)  ## install everything into .venv, once

# DeepSpeed comes as source only and looks at the installed torch: built in this environment, not in an isolated one, which
# would download a second torch; without its compiled operators, which it builds when they are first used.
# A .venv that was made by hand and holds the program is taken as it is.
$(READY):
	@if [ -z "$$(ls .venv/.ready-* 2>/dev/null)" ] && $(BIN)/python -c 'import scalepeft, pytest, xdist, ruff' 2>/dev/null; then touch $@; \
	else $(MAKE) --no-print-directory install && rm -f .venv/.ready-* && touch $@; fi

install:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools wheel
	if [ "$$(uname)" = Linux ]; then DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation deepspeed; fi
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'

quickstart: setup  ## fetch a small model and data, train, evaluate and verify: minutes on a CPU
	$(BIN)/scalepeft fetch quickstart
	$(BIN)/scalepeft train quickstart
	@echo
	@echo "look at runs/quickstart: run.json (all figures), curves.png, adapter/"

# two processes of one thread each: 421 s on two cores, where one process took 776 s
test: setup  ## the tests that take seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not long and not gpu and not cluster'

test-all: setup  ## all tests that need no GPU
	$(BIN)/python -m pytest -m 'not gpu and not cluster'

test-long: setup  ## what test leaves out of test-all
	$(BIN)/python -m pytest -m 'long and not gpu and not cluster'

test-cluster: setup  ## jobs on a real Slurm of three nodes on this machine, which it installs where it may
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { command -v slurmctld && command -v slurmd && command -v ip; } >/dev/null; \
	then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null; fi
	$(BIN)/python -m pytest -m 'cluster and not long'

lint: setup  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

schema: setup  ## write recipes/schema.json anew
	$(BIN)/scalepeft schema > recipes/schema.json

recipes-table: setup  ## write recipes/README.md anew
	$(BIN)/python benchmarks/recipes_table.py

layouts-table: setup  ## run the layout contract and write docs/layouts.md anew
	$(BIN)/python benchmarks/layouts_table.py

bench: setup  ## measure what is claimed about speed, by the short form of each script that has one
	@missed=; for script in $$(grep -l 'argument("--short"' benchmarks/*.py); do \
		echo "== $$script"; $(BIN)/python $$script --short || missed="$$missed $$script"; done; \
	if [ -n "$$missed" ]; then echo "missed, or failed:$$missed" >&2; exit 1; fi

performance: setup  ## write docs/performance.md anew, from benchmarks/results
	$(BIN)/python benchmarks/performance_page.py
