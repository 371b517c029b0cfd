# Every target creates its own virtual environment. Requirements: Python 3.11 or newer, pip and make.

unexport PYTHONDONTWRITEBYTECODE  # with it, every process would compile all modules of the libraries again

PYTHON ?= python3
VENV := .venv
MATRIX := .venv-matrix
BIN := $(VENV)/bin
# On small models, two worker processes with one thread each are faster than one process with two threads.
WORKERS ?= 2

# The lowest supported releases of the adapters' dependencies, from pyproject.toml: torch==2.7 peft==0.19 …
LOWEST := $(shell $(PYTHON) -c 'import re, tomllib; \
  dependencies = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
  adapters = [name for name in dependencies if re.match("accelerate|huggingface|peft|torch|transformers", name)]; \
  print(*(re.sub(">=([^,]+),.*", r"==\1", name) for name in adapters))')
# The tests that depend on these releases.
ADAPTER_TESTS := tests/tuner tests/baselines tests/training tests/test_security.py tests/test_errors.py tests/export/test_push.py
PYTEST := -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-slow stress bench gpu check lint docs dist test-lowest-peft test-matrix test-peft test-serving test-integrations test-ray audit clean

demo: $(VENV)/.demo  ## tune SmolLM2 on the built-in tasks with LoRA and with BADIT
	$(BIN)/badit demo

# Unbuffered: the summary is printed last.
test: $(VENV)/.dev  ## every command and method, in about five minutes
	PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) tests

test-slow: $(VENV)/.dev test-lowest-peft  ## kills, full disks, browsers, fuzzing, several processes, and the lowest supported PEFT
	PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow tests

stress: $(VENV)/.dev $(VENV)/deepspeed  ## long robustness tests: invalid input, kills, full disks, links, two processes, DeepSpeed
	BADIT_STRESS=4 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m slow tests/fuzz
	BADIT_STRESS=4 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' -n $(WORKERS) tests/training/test_kills.py \
	  tests/training/test_disks.py tests/training/test_reliability.py tests/test_security.py
	PYTHONPATH=$(abspath $(VENV)/deepspeed) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/training/test_deepspeed.py

# In a separate folder, because libraries import DeepSpeed whenever it is installed. It builds from source, which needs torch.
$(VENV)/deepspeed: pyproject.toml | $(VENV)/.dev
	$(BIN)/pip install --quiet setuptools wheel
	$(BIN)/pip install --quiet --target $@ --no-deps --no-build-isolation \
	  'deepspeed>=0.19,<1' einops hjson msgpack ninja py-cpuinfo
	touch $@

# SuperNI's prompts if available, otherwise those of the built-in tasks.
BENCH_DATA := $(if $(BADIT_SUPERNI),--data $(BADIT_SUPERNI))
bench: $(VENV)/.dev  ## speed and memory, about an hour on two idle cores: results/speed and docs/performance.md
	for script in imports attention regrouping decomposition training_step optimizer step_profile decoding scaling; do \
	  $(BIN)/python benchmarks/speed/$$script.py || exit 1; \
	done
	for script in end_to_end evaluation; do $(BIN)/python benchmarks/speed/$$script.py $(BENCH_DATA) || exit 1; done
	$(BIN)/python benchmarks/speed/table.py

# Needs no network, once the packages and the base model are there.
gpu: $(VENV)/.dev  ## on a machine with a GPU: tests, steps and memory against PEFT's LoRA, SVD, clusters, decoding
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py tests/training/test_no_sync.py
	$(BIN)/python benchmarks/speed/gpu.py

check: lint test test-slow  ## the same checks as CI

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The variable disables a notice of the theme about MkDocs 2.
docs: $(VENV)/.dev  ## the documentation as a site, in site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

dist: $(VENV)/.dev  ## source distribution and wheel, in dist/
	rm -rf dist
	$(BIN)/hatchling build

# --no-deps: the other packages stay as they are. The hub's client needs an HTTP client that has another name in its version 2.
# The folder precedes the virtual environment's packages on the path.
LOWEST_HUGGING_FACE := $(filter huggingface-hub% peft% transformers%,$(LOWEST))
test-lowest-peft: $(VENV)/lowest-peft/.done
	PYTHONPATH=$(VENV)/lowest-peft OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ADAPTER_TESTS)

$(VENV)/lowest-peft/.done: $(VENV)/.dev pyproject.toml
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) $(LOWEST_HUGGING_FACE) 'httpx<1' 'httpcore<2'
	touch $@

# Each in its own virtual environment of several gigabytes: the lowest torch includes its GPU libraries.
test-matrix: $(MATRIX)/lowest/.done $(MATRIX)/newest/.done  ## adapter tests on the lowest and on the newest releases
	for row in lowest newest; do \
	  OMP_NUM_THREADS=1 $(MATRIX)/$$row/bin/python $(PYTEST) -m '' $(ADAPTER_TESTS) || exit 1; \
	done

$(MATRIX)/lowest/.done: REQUIREMENTS := $(LOWEST) --editable '.[test]'
$(MATRIX)/newest/.done: REQUIREMENTS := --upgrade --upgrade-strategy eager --editable '.[dev]'
$(MATRIX)/%/.done: pyproject.toml
	$(PYTHON) -m venv $(MATRIX)/$*
	$(MATRIX)/$*/bin/pip install --quiet $(REQUIREMENTS)
	touch $@

# Queries a network service for known vulnerabilities. --strict: packages unknown to the service fail too.
audit: $(VENV)/.dev  ## known vulnerabilities of the installed packages
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet 'pip-audit>=2.9,<3'
	$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audit/installed.txt

# PEFT's own tests, on BADIT. They are in its source distribution, whose hash pip checks before opening it. Its package
# precedes that of the virtual environment on the path, so package and tests have the same version.
PEFT_SOURCE := $(VENV)/peft-0.21.2-source
PEFT_TESTS := $(foreach name,config custom_models decoder_models feature_extraction_models seq_classifier,$(PEFT_SOURCE)/tests/test_$(name).py)
test-peft: $(VENV)/.dev $(PEFT_SOURCE)
	PYTHONPATH=$(PEFT_SOURCE)/src:tests/peft_suite PEFT_SUITE_MODELS=$(PEFT_SOURCE)/models HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -p peft_suite_plugin -p no:cacheprovider -q -c /dev/null --rootdir $(PEFT_SOURCE) $(PEFT_TESTS)

$(PEFT_SOURCE): tests/peft_suite/peft.txt | $(VENV)/.dev
	rm -rf $@ $@.partial
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --require-hashes --requirement $< --dest $@.partial
	tar -xzf $@.partial/peft-*.tar.gz -C $@.partial --strip-components 1
	touch $@.partial/tests/__init__.py  # the tests import each other as a package
	mv $@.partial $@

# Exports in vLLM and llama.cpp on Linux x64 without a GPU; needs node and npm. vLLM pins its own torch and transformers, so
# it has its own environment. pip checks the hash of the source distribution that has llama.cpp's converters.
SERVING := $(VENV)/serving
LLAMA_CPP := convert_hf_to_gguf.py convert_lora_to_gguf.py conversion gguf-py
test-serving: $(VENV)/.dev $(SERVING)/.done
	rm -rf $(SERVING)/work  # a run of earlier code
	BADIT_SERVING=$(abspath $(SERVING)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/serving
	cp $(SERVING)/results.json benchmarks/results/serving.json

$(SERVING)/.done: pyproject.toml tests/serving/vllm.txt tests/serving/llama.txt
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/pip install --quiet --requirement tests/serving/vllm.txt --editable .
	$(SERVING)/bin/pip uninstall --quiet --yes torchaudio torchcodec  # these releases do not load with vLLM's torch
	npm install --silent --prefix $(SERVING) --ignore-scripts --omit optional node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	$(SERVING)/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --require-hashes \
	  --requirement tests/serving/llama.txt --dest $(SERVING)/source
	mkdir $(SERVING)/llama.cpp
	tar -xzf $(SERVING)/source/llama_cpp_python-*.tar.gz -C $(SERVING)/llama.cpp --strip-components 3 \
	  --wildcards $(LLAMA_CPP:%='*/vendor/llama.cpp/%')
	touch $@

# Other tools with badit, each in its own environment of some gigabytes. Axolotl and LLaMA-Factory pin older releases than
# badit's dependencies, so badit is installed without its own there.
INTEGRATIONS := $(VENV)/integrations
test-integrations: $(VENV)/.dev $(patsubst tests/integrations/%.txt,$(INTEGRATIONS)/%/.done,$(wildcard tests/integrations/*.txt))
	BADIT_INTEGRATIONS=$(abspath $(INTEGRATIONS)) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/integrations

$(INTEGRATIONS)/%/.done: tests/integrations/%.txt pyproject.toml
	$(PYTHON) -m venv --clear $(INTEGRATIONS)/$*
	$(INTEGRATIONS)/$*/bin/pip install --quiet --requirement $<
	$(INTEGRATIONS)/$*/bin/pip install --quiet --no-deps --editable .
	touch $@

# In a separate folder, because Ray brings its own versions of some packages.
test-ray: $(VENV)/.dev $(VENV)/ray  ## badit compare --ray on a cluster of two nodes on this machine
	PYTHONPATH=$(abspath $(VENV)/ray) RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -m slow tests/comparison/test_ray.py

$(VENV)/ray: pyproject.toml | $(VENV)/.dev
	rm -rf $@
	$(BIN)/pip install --quiet --target $@ 'ray>=2.40,<3'
	touch $@

$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'  # modules are compiled when they are first imported
	touch $@ $(VENV)/.demo

$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "badit needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(MATRIX) build dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache
