# Every target sets up its own virtual environment; a machine needs Python 3.11 or newer, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two worker processes with a thread each beat one process with two threads on small models.
WORKERS ?= 2

.PHONY: demo test stress check lint test-lowest-peft clean

demo: $(VENV)/.demo  ## SmolLM2 tuned on the built-in tasks by LoRA and by BADIT
	$(BIN)/badit demo

test: $(VENV)/.dev test-lowest-peft  ## all tests, and those of the adapters and their training again on the lowest supported PEFT
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests

stress: $(VENV)/.dev  ## the long sweeps: every kind of run killed at 20 random steps and in 20 random operations on its files
	BADIT_STRESS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/training/test_kills.py

check: lint test  ## what CI checks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# --no-deps: only PEFT itself changes; the folder goes before the virtual environment's packages.
LOWEST_PEFT := $(VENV)/peft-0.19.0
test-lowest-peft: $(VENV)/.dev $(LOWEST_PEFT)
	PYTHONPATH=$(LOWEST_PEFT) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/tuner tests/baselines tests/training

$(LOWEST_PEFT): $(VENV)/.dev
	$(BIN)/pip install --quiet --no-deps --target $@ peft==0.19.0

$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable ".[report]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "badit needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
