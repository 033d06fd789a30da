# OrbitFlow for SGLang. `make` lists the targets; `serve` and `test` need nothing else done before.

# The interpreter that creates .venv: Python 3.11, for which the pinned wheels are.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Give CPU=1 to set up without CUDA where there is a GPU.
CPU ?=
# A model's folder to serve instead of the embedded tiny model.
MODEL ?=
# Passed on as they are: make serve ARGS="--policy all-host -- --page-size 16"
ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --no-compile
STAMP := .venv/.set-up
# Nothing is looked up on the network once the set-up is done.
OFFLINE := HF_HUB_OFFLINE=1
# Processes; servers wait often enough for a third on two cores (tests/conftest.py).
PARALLEL := -n 3

.PHONY: help setup serve tiny-model demo test lint test-full gpu-check gpu-test gpu-bundle \
  bench-overhead bench-stream bench-planner bench-gpu eval eval-quick eval-full eval-live eval-gpu image-test clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | \
	  while read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## create .venv and install everything (CPU=1: without CUDA)

# torch comes first and with its dependencies: the default build needs the libraries that it
# declares. The rest is closed and pinned: SGLang's own list would bring 10 GB of CUDA packages.
$(STAMP): requirements/cpu.txt requirements/dev.txt pyproject.toml
	@rm -f $@
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed: \
	make setup PYTHON=/path/to/python3.11")'
	@test -x $(PY) || { echo "Creating .venv"; "$(PYTHON)" -m venv .venv; }
	@if [ -z "$(CPU)" ] && nvidia-smi >/dev/null 2>&1; then \
	  echo "Installing SGLang with CUDA and the project (over 10 GB)" && \
	  $(PIP) -e '.[cuda,dev]'; \
	else \
	  echo "Installing torch 2.13.0" && \
	  $(PIP) torch==2.13.0 && \
	  echo "Installing SGLang 0.5.23 for CPU and the tools" && \
	  $(PIP) --no-deps -r requirements/cpu.txt -r requirements/dev.txt && \
	  echo "Installing the project" && \
	  $(PIP) --no-deps --no-build-isolation -e .; \
	fi
	@echo "Compiling what was installed"  # some of it are templates that are no Python: || true
	@$(PY) -m compileall -qq -j 0 .venv/lib orbitflow_sglang eval || true
	@touch $@

serve: setup ## serve the tiny model, or MODEL=/path, with OrbitFlow on
	@$(OFFLINE) MODEL="$(MODEL)" $(PY) -m eval.serve $(ARGS)

tiny-model: setup ## make the tiny model; its path is the last line (make -s tiny-model)
	@$(PY) -m eval.tiny_model

demo: setup ## long requests at once, with layers on device and host, against stock SGLang
	@$(OFFLINE) $(PY) -m eval.demo $(ARGS)

# A test's limit includes the start of the server that it is the first to use.
test: setup lint ## lint, types and tests
	$(OFFLINE) $(PY) -m pytest $(PARALLEL) --timeout 900 --durations 25 $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-full: setup ## every test that can run here, in full; writes eval/results/identity/
	ORBITFLOW_TEST_FULL=1 ORBITFLOW_TEST_SUMMARY=eval/results/identity/summary.json \
	  ORBITFLOW_TEST_COMMAND="make test-full" $(OFFLINE) \
	  $(PY) -m pytest $(PARALLEL) --timeout 3600 $(ARGS)

gpu-check: gpu-test bench-gpu ## gpu-test, bench-gpu, then eval-gpu, which goes on where it was
	@$(MAKE) eval-gpu ARGS="--resume"

gpu-test: setup ## every test marked gpu, on an NVIDIA GPU
	@nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || \
	  { echo "make gpu-test needs an NVIDIA GPU" >&2; exit 1; }
	$(OFFLINE) $(PY) -m pytest -m gpu --timeout 1800 --durations 10 $(ARGS)

gpu-bundle: setup ## build/gpu-bundle: what a GPU machine without a network lacks, in parts
	@$(PY) -m eval.gpu_bundle $(ARGS)

bench-overhead: setup ## decode throughput, all resident, against stock SGLang (ARGS="--waiting 1000")
	@$(OFFLINE) $(PY) -m eval.bench.overhead $(ARGS)

bench-stream: setup ## measured step time over an emulated link, against the bound
	@$(OFFLINE) $(PY) -m eval.bench.stream $(ARGS)

bench-planner: setup ## time and quality of plans, and what each idea brings
	@$(OFFLINE) $(PY) -m eval.bench.planner $(ARGS)

bench-gpu: setup ## on an NVIDIA GPU: page transfers against one large copy, overhead, bound by the link
	@$(PY) -m eval.bench.link
	@$(OFFLINE) $(PY) -m eval.bench.overhead --gpu
	@$(OFFLINE) $(PY) -m eval.bench.stream --gpu

eval: setup ## tables and figures of the simulated evaluation; a sample is run again
	@$(PY) -m eval.sim.report $(ARGS)

eval-quick: setup ## a smoke run of the simulated evaluation, in under a minute
	@$(PY) -m eval.sim.campaign --quick $(ARGS)

eval-full: setup ## every run of the simulated evaluation (hours; goes on where it was)
	@$(PY) -m eval.sim.campaign $(ARGS)

eval-live: setup ## serving policies on real servers in real time (hours; --quick, --resume)
	@$(OFFLINE) $(PY) -m eval.live.compare $(ARGS)

eval-gpu: setup ## the same on an NVIDIA GPU, 8B shape, capped KV budget (hours; --quick, --resume)
	@$(OFFLINE) $(PY) -m eval.live.compare --gpu $(ARGS)

image-test: setup ## build the CPU image without a container engine and ask it for tokens (root)
	@sh docker/test_image.sh

clean: ## remove .venv, the tiny models, logs and caches
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
