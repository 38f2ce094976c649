# `make demo` and `make test` do all set-up themselves: a virtual environment, an install, a build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A build with that choice of kernels; .built is any build, with which a `make` that chooses nothing is content.
BUILT := $(VENV)/.built$(DRIVE_CUDA)
BUILD_TOOLS := setuptools ninja wheel
EVERYTHING := ".[vision,experiments,structured,dev]"

.PHONY: demo test test-slow test-all bench results paper pipeline gpu-smoke gpu gpu-table1 spills lint sanitize wheel clean

demo: $(BUILT)
	$(BIN)/drive prune

IN_PARALLEL = -n auto --maxprocesses 4 --dist loadfile
# A file of tests at a time on each core. Tests that want several threads ask for them.
test: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(IN_PARALLEL)

# Those that take long and seldom find more: kernels for all GPUs, runs killed at random moments.
test-slow: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(IN_PARALLEL) -m slow
test-all: test test-slow

bench: $(BUILT)
	$(BIN)/pytest benchmarks/ --benchmark-only

# The tables in docs/results: hours, and meaningful on a quiet machine only.
results: $(BUILT)
	mkdir -p build && $(BIN)/pytest benchmarks/ --benchmark-only --benchmark-json build/bench.json
	$(BIN)/python -m benchmarks.table build/bench.json docs/results/bench.md
	$(BIN)/python -m benchmarks.cpu.prune --out docs/results/cpu.md
	$(BIN)/python -m benchmarks.cpu.sparse.measure --out docs/results/sparse-cpu.jsonl
	$(BIN)/python -m benchmarks.cpu.sparse.report docs/results/sparse-cpu.jsonl docs/results/sparse-cpu.md
	$(BIN)/python -m benchmarks.cpu.engine.race --out docs/results/sparse-engine.jsonl \
	    $(if $(DEEPSPARSE),--deepsparse $(DEEPSPARSE))
	$(BIN)/python -m benchmarks.cpu.engine.report docs/results/sparse-engine.jsonl docs/results/sparse-engine.md

# The paper's experiments at a size for two cores (docs/paper.md), in docs/results: hours, and what is
# finished is not run again. make paper DATA=cifar10.tar.gz
SMALL = --scale 0.2 --precision bfloat16 --channels-last --data-dir $(or $(DATA),cifar10.tar.gz)
paper: $(BUILT)
	$(BIN)/drive table1 --rows cifar10-cnn4 $(SMALL) --out runs/cnn4
	$(BIN)/drive figure6 --rows cifar10-cnn4 $(SMALL) --out runs/cnn4
	$(BIN)/drive figure5 --rows cifar10-cnn4 --seeds 1 $(SMALL) --out runs/cnn4
	$(BIN)/drive ablation --rows cifar10-cnn4 --seeds 1 $(SMALL) --out runs/cnn4
	$(BIN)/drive table1 --rows cifar10-resnet8 --seeds 1 $(SMALL) --out runs/resnet8
	for row in cnn4 resnet8; do mkdir -p docs/results/$$row && \
	    cp runs/$$row/*.* docs/results/$$row; done

# docs/results/pipeline.md: under two hours on two cores. make pipeline DATA=cifar10.tar.gz
pipeline: $(BUILT)
	$(BIN)/drive pipeline --rows digits-mlp,cifar10-vgg16-narrow --forwards \
	    --data-dir $(or $(DATA),cifar10.tar.gz) --out runs/pipeline
	cp runs/pipeline/*.* docs/results

# Builds, checks and measures on a GPU (docs/gpu.md) with the torch that is there: $(PYTHON)'s, else the
# environment's. make gpu OUT_DIR=folder MINUTES=9
gpu:
	@for python in $(PYTHON) $(wildcard $(BIN)/python); do $$python -c 'import torch' 2>/dev/null && break; done; \
	$$python -m benchmarks.gpu.full $(if $(OUT_DIR),--out $(OUT_DIR)) $(if $(MINUTES),--minutes $(MINUTES))

# The first three minutes of that: do the pruning kernels work here, and how fast? make gpu-smoke OUT_DIR=folder
gpu-smoke:
	@for python in $(PYTHON) $(wildcard $(BIN)/python); do $$python -c 'import torch' 2>/dev/null && break; done; \
	$$python -m benchmarks.gpu.smoke $(if $(OUT_DIR),--out $(OUT_DIR))

# Rows of the paper's Table 1 on a GPU (docs/paper.md), eight minutes a call; the next call goes on from there.
# make gpu-table1 DATA=cifar10.tar.gz OUT_DIR=folder LAST=folder-of-the-last-call MINUTES=8 ROWS=cifar10-alexnet
gpu-table1:
	@for python in $(PYTHON) $(wildcard $(BIN)/python); do $$python -c 'import torch' 2>/dev/null && break; done; \
	$$python -m benchmarks.gpu.table1 $(if $(DATA),--data $(DATA)) $(if $(OUT_DIR),--out $(OUT_DIR)) \
	    $(if $(LAST),--last $(LAST)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ROWS),--rows $(ROWS)) \
	    $(if $(METHODS),--methods $(METHODS)) $(if $(SEEDS),--seeds $(SEEDS)) \
	    $(if $(PRECISION),--precision $(PRECISION))

# Registers, spills and shared memory of the Triton kernels on GPUs of three kinds, none of which need be here.
spills: $(BUILT)
	$(BIN)/python -m benchmarks.gpu.spills

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The ops' tests on a build that watches every address and every undefined operation.
SANITIZE := build/sanitize
sanitize: $(BUILT)
	CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
	LDFLAGS="-fsanitize=address,undefined" DRIVE_CUDA=0 \
	    $(BIN)/python setup.py -q build --build-lib $(SANITIZE) --build-temp $(SANITIZE).tmp
	PYTHONPATH=$(SANITIZE) PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    $(BIN)/pytest tests/core/test_fused.py tests/kernels/prune/test_prune_op.py \
	        tests/kernels/prune/test_shard_ops.py tests/kernels/sparse

# dist: an sdist, and a wheel made of it for the torch in .venv (make wheel TORCH=2.13.0: for that one). It is
# built where nothing but its build requirements is, installed where nothing is, and used there. Newer pips
# constrain a build by the second variable.
TORCH ?= $(shell $(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')
WHEEL := build/wheel
wheel: $(VENV)/.installed
	rm -rf dist $(WHEEL) python/*.egg-info && mkdir -p $(WHEEL) && echo "torch==$(TORCH)" >$(WHEEL)/torch.txt
	$(BIN)/python setup.py -q sdist
	PIP_CONSTRAINT=$(WHEEL)/torch.txt PIP_BUILD_CONSTRAINT=$(WHEEL)/torch.txt \
	    $(BIN)/pip wheel -q --no-deps --wheel-dir dist dist/*.tar.gz
	$(PYTHON) -m venv $(WHEEL)/fresh
	$(WHEEL)/fresh/bin/pip install -q -c $(WHEEL)/torch.txt "$$(echo dist/*.whl)[cli]"
	cd $(WHEEL) && fresh/bin/drive info && fresh/bin/python -c 'import torch, drive, drive_kernels; \
	    weight, grad = torch.randn(2, 1000); \
	    result = drive.fused_drive_prune([weight], [grad], sparsity=0.9); \
	    assert drive_kernels._C and result.pruned == (weight == 0).sum() == 900'

# $(call install,WHAT): nothing newer than what was tested. Where the index could be asked and has no such
# versions any more, what it has. What setup.py says, which pip keeps to itself.
define install
@all=$(VENV)/pip-all.log; log=$(VENV)/pip.log; rm -f $$all; \
pip="$(BIN)/pip install -q --disable-pip-version-check --log $$all"; \
echo $$pip -c constraints.txt '$(1)'; $$pip -c constraints.txt $(1) 2>$$log; status=$$?; cat $$log >&2; \
if [ $$status != 0 ] && grep -q 'ResolutionImpossible\|No matching distribution' $$log && \
    ! grep -q 'connection broken\|Could not fetch' $$log; then \
    $$pip $(1); status=$$?; [ $$status != 0 ] || \
    echo 'make: pip found no versions within constraints.txt, see above: untested ones were installed' >&2; \
fi; sed -n 's/.*\(setup\.py: \)/\1/p' $$all | sort -u; exit $$status
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or later")'
	$(PYTHON) -m venv $(VENV)
	$(call install,$(BUILD_TOOLS) "torch>=2.10")
	touch $@

$(BUILT): $(VENV)/.installed setup.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)
	$(call install,--no-build-isolation -e $(EVERYTHING))
	rm -f $(VENV)/.built* && touch $(VENV)/.built $@

clean:
	rm -rf build dist $(VENV) python/*.egg-info python/drive_kernels/*.so
