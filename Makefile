# make pretrain: from nothing to a trained model, its loss curve and the baselines it beats.
PYTHON ?= python3.11
VENV ?= .venv
RUN ?= runs/demo
RANKS ?= 2
# Processes that run tests side by side (a file's tests stay together): one has Slurm's, which mostly
# wait, and two compute.
WORKERS ?= 3
ARGS ?=
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' requirements.txt)
# What the set-up of deepspeed (a source package) imports, beside torch.
BUILD := setuptools wheel numpy ninja packaging py-cpuinfo psutil pydantic

.PHONY: pretrain environment dev test test-fast lint format fuzz golden bench board gpu-check parity torture faults kills clean

pretrain: environment data/demo/manifest.json
	$(BIN)/titans-pretrain train configs/demo.yaml folder=$(RUN) $(if $(RANKS),--ranks $(RANKS)) $(ARGS)
	$(BIN)/titans-pretrain plot $(RUN)

data/demo/manifest.json: | environment
	$(BIN)/titans-pretrain prepare configs/corpus --tokenizer tokenizers/demo.model --out data/demo

# Stamps: a second call installs nothing. Torch comes first and alone, so that pip takes the build
# for this machine and deepspeed finds it; its kernels are left unbuilt (they are not used), and its
# set-up does not look for a CUDA compiler, which a node or an image with CUDA may lack.
UNBUILT := DS_BUILD_OPS=0 DS_ACCELERATOR=cpu TORCH_CUDA_ARCH_LIST=9.0
environment: $(VENV)/.package
dev: $(VENV)/.dev

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.created
	$(BIN)/pip install --quiet --constraint requirements.txt $(TORCH) $(BUILD)
	$(UNBUILT) $(BIN)/pip install --quiet --no-build-isolation -r requirements.txt
	touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.requirements
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.package
	$(BIN)/pip install --quiet --no-build-isolation -r requirements-dev.txt
	touch $@

test: dev
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-fast: dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

lint: dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Fresh random cases of the property tests, more of them.
fuzz: dev
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

# Records the golden curves anew; tests/golden/record.py says when that is right.
golden: dev
	$(BIN)/python -m tests.golden.record

bench: environment
	$(BIN)/titans-pretrain bench memory $(ARGS)
	$(BIN)/titans-pretrain bench data $(ARGS)
	$(BIN)/titans-pretrain bench step configs/demo.yaml
	$(BIN)/titans-pretrain bench save configs/demo.yaml

# TensorBoard on all runs beside RUN.
board: environment
	$(BIN)/titans-pretrain board $(dir $(RUN)) $(ARGS)

# Checks and times a machine with CUDA GPUs, in eight minutes; leaves runs/gpu-check/report.md. Where
# there is no .venv and python3 has a torch that sees a GPU, it is taken as it is, whatever its
# version, with what it lacks from wheels/; what cannot be had is named and left out.
ifneq ($(filter gpu-check,$(MAKECMDGOALS)),)
ifeq ($(wildcard $(VENV)),)
OWN := $(shell python3 -c 'import torch; print("own" * torch.cuda.is_available())' 2>/dev/null)
endif
endif
WHEELS := $(if $(wildcard wheels/*.whl),--wheels wheels)

gpu-check: $(if $(OWN),,environment)
	$(if $(OWN),python3 -m titans_pretrain gpu-check $(WHEELS),$(BIN)/titans-pretrain gpu-check) $(ARGS)

# Every layout and variant against one plain process (hours; ARGS: --ranks 4 --variants mac).
parity: dev
	$(BIN)/python -m tests.parallel.all_layouts $(ARGS)

# Fifty times kill -9 of a rank at a random moment; stopped, it goes on counting.
torture: dev
	$(BIN)/python -m tests.torture $(ARGS)

# Whatever can happen to a job, on a real Slurm, which starts here (as root; ARGS: names of faults).
faults: dev
	$(BIN)/python -m tests.slurm.faults $(ARGS)

# Two hundred kills of jobs on a real Slurm, which starts here (as root); stopped, it goes on counting.
kills: dev
	$(BIN)/python -m tests.slurm.kills $(ARGS)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
