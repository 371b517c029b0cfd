# Every target sets up its own virtual environment; a machine needs Python 3.11 or newer, pip and make.

PYTHON ?= python3
VENV := .venv
MATRIX := .venv-matrix
BIN := $(VENV)/bin
# Two worker processes with a thread each beat one process with two threads on small models.
WORKERS ?= 2

# The lowest supported releases of what the adapters stand on, as pyproject.toml has them: torch==2.7 peft==0.19 …
LOWEST := $(shell $(PYTHON) -c 'import re, tomllib; \
  wanted = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
  print(*(re.sub(">=([^,]+),.*", r"==\1", one) for one in wanted if re.match("accelerate|peft|torch|transformers", one)))')
# What depends on those releases.
ADAPTER_TESTS := tests/tuner tests/baselines tests/training tests/test_security.py
PYTEST := -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test stress bench check lint docs dist test-lowest-peft test-matrix test-peft audit clean

demo: $(VENV)/.demo  ## SmolLM2 tuned on the built-in tasks by LoRA and by BADIT
	$(BIN)/badit demo

test: $(VENV)/.dev test-lowest-peft  ## all tests, and those of the adapters and their training again on the lowest supported PEFT
	PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests  # unbuffered: the summary stays last

stress: $(VENV)/.dev $(VENV)/atheris $(VENV)/deepspeed  ## the long sweeps: runs killed at every turn, broken input by the thousands, DeepSpeed
	BADIT_STRESS=4 PYTHONPATH=$(abspath $(VENV)/atheris) OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests/fuzz
	BADIT_STRESS=4 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests/training/test_kills.py
	PYTHONPATH=$(abspath $(VENV)/deepspeed) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training/test_deepspeed.py

$(VENV)/atheris: pyproject.toml | $(VENV)/.dev
	$(BIN)/pip install --quiet --target $@ --no-deps 'atheris>=3,<4'
	touch $@

# In a folder of its own, since everything that finds it imports it. It builds from source, for which torch must be there.
$(VENV)/deepspeed: pyproject.toml | $(VENV)/.dev
	$(BIN)/pip install --quiet setuptools wheel
	$(BIN)/pip install --quiet --target $@ --no-deps --no-build-isolation \
	  'deepspeed>=0.19,<1' einops hjson msgpack ninja py-cpuinfo
	touch $@

# SuperNI's prompts where they are at hand, else those of the built-in tasks.
BENCH_DATA := $(if $(BADIT_SUPERNI),--data $(BADIT_SUPERNI))
bench: $(VENV)/.dev  ## speed and memory, about an hour on two quiet cores: results/speed and docs/performance.md
	for script in imports attention regrouping decomposition training_step step_profile decoding scaling; do \
	  $(BIN)/python benchmarks/speed/$$script.py || exit 1; \
	done
	for script in end_to_end evaluation; do $(BIN)/python benchmarks/speed/$$script.py $(BENCH_DATA) || exit 1; done
	$(BIN)/python benchmarks/speed/table.py

check: lint test  ## what CI checks

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The variable switches off the theme's notice about another program's next release.
docs: $(VENV)/.dev  ## the documentation as a site, in site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.dev  ## source distribution and wheel, in dist/
	rm -rf dist
	$(BIN)/hatchling build

# --no-deps: only PEFT itself changes; the folder goes before the virtual environment's packages.
LOWEST_PEFT := $(VENV)/$(subst ==,-,$(filter peft%,$(LOWEST)))
# What starts whole processes takes minutes and asks nothing of PEFT that the other tests do not.
PROCESSES := test_kills test_several_processes
test-lowest-peft: $(VENV)/.dev $(LOWEST_PEFT)
	PYTHONPATH=$(LOWEST_PEFT) OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(PROCESSES:%=--ignore tests/training/%.py) $(ADAPTER_TESTS)

$(LOWEST_PEFT): $(VENV)/.dev
	$(BIN)/pip install --quiet --no-deps --target $@ $(filter peft%,$(LOWEST))

# Each in a virtual environment of its own, of some gigabytes: the lowest torch comes with its GPU libraries.
test-matrix: $(MATRIX)/lowest/.done $(MATRIX)/newest/.done  ## the adapters' tests on the lowest and on the newest releases
	for row in lowest newest; do \
	  OMP_NUM_THREADS=1 $(MATRIX)/$$row/bin/python $(PYTEST) $(ADAPTER_TESTS) || exit 1; \
	done

$(MATRIX)/lowest/.done: REQUIREMENTS := $(LOWEST) --editable '.[test]'
$(MATRIX)/newest/.done: REQUIREMENTS := --upgrade --upgrade-strategy eager --editable '.[dev]'
$(MATRIX)/%/.done: pyproject.toml
	$(PYTHON) -m venv $(MATRIX)/$*
	$(MATRIX)/$*/bin/pip install --quiet $(REQUIREMENTS)
	touch $@

# Asks a service on the network for known holes in what is installed. --strict: what it knows nothing of fails, too.
audit: $(VENV)/.dev  ## known vulnerabilities of the installed packages
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet 'pip-audit>=2.9,<3'
	$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audit/installed.txt

# PEFT's own tests, on BADIT. They come with its source distribution, whose hash pip checks before it opens it; its
# package goes before the virtual environment's, so that the two are of one version.
PEFT_SOURCE := $(VENV)/peft-0.21.2-source
PEFT_TESTS := $(foreach name,config custom_models decoder_models feature_extraction_models seq_classifier,$(PEFT_SOURCE)/tests/test_$(name).py)
test-peft: $(VENV)/.dev $(PEFT_SOURCE)
	PYTHONPATH=$(PEFT_SOURCE)/src:tests/peft_suite PEFT_SUITE_MODELS=$(PEFT_SOURCE)/models HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -p peft_suite_plugin -p no:cacheprovider -q -c /dev/null --rootdir $(PEFT_SOURCE) $(PEFT_TESTS)

$(PEFT_SOURCE): tests/peft_suite/peft.txt | $(VENV)/.dev
	rm -rf $@ $@.partial
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --require-hashes --requirement $< --dest $@.partial
	tar -xzf $@.partial/peft-*.tar.gz -C $@.partial --strip-components 1
	touch $@.partial/tests/__init__.py  # they import one another as a package
	mv $@.partial $@

$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "badit needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(MATRIX) build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
