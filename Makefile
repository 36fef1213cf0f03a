# `make quickstart` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a process: two busy processes of two threads each are slower than of one.
RUN := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# compare_recipes.py once a core: each takes what no other is at, and the same command goes on where it was stopped.
WORKERS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
define compare
	@pids=""; for worker in $$(seq $(WORKERS)); do \
		$(RUN) $(BIN)/python recipes/compare_recipes.py $(1) & pids="$$pids $$!"; \
	done; for pid in $$pids; do wait $$pid || exit 1; done
endef

.PHONY: help setup quickstart test test-docs test-slow reproduce-quick reproduce docs lint format clean

help:
	@echo "make quickstart  set up, train both stages of a tiny IOMM (about seven minutes), draw pictures"
	@echo "make test        set up and run the tests (nine minutes on two cores; sixteen on slow ones)"
	@echo "make test-docs   run what the guides tell to run, from one to the next"
	@echo "make test-slow   the longer checks as well"
	@echo "make reproduce-quick  one seed of the six recipes (one to two and a half hours on two cores)"
	@echo "make reproduce        every study, all seeds (seven to fourteen hours); both go on where they were stopped"
	@echo "make docs        build the documentation, outputs/docs/index.html; a broken link is an error"
	@echo "make lint        ruff and mypy"
	@echo "make clean       remove the environment and all outputs"

$(BIN)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[train,eval,test]"
	touch $@

setup: $(BIN)/installed

quickstart: setup
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/quickstart.py

test: setup
	$(RUN) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-docs: setup
	$(RUN) $(BIN)/python -m pytest tests/test_docs.py -m slow

test-slow: setup
	$(RUN) $(BIN)/python -m pytest -n 2 --dist worksteal

reproduce-quick: setup
	$(call compare,--seeds 0)

reproduce: setup
	$(call compare,--studies all)

docs: setup
	$(RUN) $(BIN)/python -m sphinx -W --keep-going -q docs outputs/docs
	@echo "Open outputs/docs/index.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs
