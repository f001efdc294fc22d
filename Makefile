# Every target makes what it needs, the virtual environment included. From a bare clone:
#
#   make demo   start the stack on this machine and ask it something
#   make test   lint, types, import rules and the whole test suite
#   make gpu    correctness and speed on an NVIDIA GPU (scripts/gpu.sh; needs no .venv and no network)
#
# Variables (make test PYTHON=/usr/bin/python3.12):
#   PYTHON           interpreter for .venv, at least 3.11
#   TORCH_SPEC       torch requirement to install; default torch==2.13.0, or the supported range
#                    where there is an NVIDIA GPU
#   TORCH_INDEX_URL  package index for torch alone, e.g. one that carries CPU builds
#   PYTEST_ARGS      arguments for pytest in `make test`, e.g. "tests/cli -k port"

SHELL := /bin/sh
.SUFFIXES:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
TORCH_RANGE := torch>=2.11,<2.14

# The first interpreter that runs (a pyenv shim may exist and still fail) and is new enough.
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$p"; break; }; done)
endif

.PHONY: help demo test infra-test lint gpu demo-model proto constraints clean distclean

help:
	@echo 'make demo        start router, prefill and decode worker here and ask the demo model'
	@echo 'make test        ruff, mypy, import rules, pytest'
	@echo 'make lint        the same without pytest'
	@echo 'make infra-test  what is deployed, validated: chart, images, compose, alerts, workflows'
	@echo 'make gpu         tests and benchmark on an NVIDIA GPU, results in docs/results'
	@echo 'make demo-model  train the embedded demo model again (CPU, under 45 minutes on 2 cores)'
	@echo 'make proto       generate the protocol stubs from the .proto files'
	@echo 'make constraints pin what the environment holds, after its tests have passed'
	@echo 'make clean       remove caches and build products; distclean removes .venv too'

demo: $(VENV)/.installed-all
	@$(BIN)/kvrelay demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	@scripts/check.sh all

lint: $(VENV)/.installed-dev
	@scripts/check.sh lint

infra-test: $(VENV)/.installed-dev
	@scripts/infra_test.sh

gpu:
	@PYTHON='$(PYTHON)' scripts/gpu.sh

demo-model: $(VENV)/.installed-dev
	$(BIN)/python demo_model/train.py --out protocol/kvrelay_protocol/demo_model

proto: $(VENV)/.installed-dev
	$(BIN)/python -m grpc_tools.protoc -Iprotocol --python_out=protocol --pyi_out=protocol \
		--grpc_python_out=protocol protocol/kvrelay_protocol/fleet.proto \
		protocol/kvrelay_protocol/externalscaler.proto

constraints: $(VENV)/.installed-dev
	@$(BIN)/python scripts/constraints.py > constraints.txt.new && mv constraints.txt.new constraints.txt

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# --- set-up: venv, then torch alone, then everything else against that torch ------------------

$(VENV)/.created:
	@PYTHON='$(PYTHON)' TORCH_RANGE='$(TORCH_RANGE)' scripts/setup.sh venv
	@touch $@

$(VENV)/.installed-torch: $(VENV)/.created
	@TORCH_RANGE='$(TORCH_RANGE)' TORCH_SPEC='$(TORCH_SPEC)' TORCH_INDEX_URL='$(TORCH_INDEX_URL)' \
		scripts/setup.sh torch
	@touch $@

$(VENV)/.installed-all: pyproject.toml constraints.txt $(VENV)/.installed-torch
	@echo 'packages: kvrelay[all] (minutes the first time)'
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

# dev contains all: a later `make demo` has nothing to do.
$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.installed-torch
	@echo 'packages: kvrelay[dev] (minutes the first time)'
	@$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $(VENV)/.installed-all $@
