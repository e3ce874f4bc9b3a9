# One word a job: `make sentiment` trains the embedded default, `make test` runs the tests, `make
# help` lists the rest. Each sets up what it needs, once; Python 3.11+ with pip is all it starts from.
#
#   PYTHON=python3.12 make test                             another Python
#   make sentiment ARGS="--data_file my.csv --max_rows 600" options of lora-fsdp train
#   make sentiment CONFIG=accelerate_configs/fsdp2.yaml     another accelerate YAML
#   make sentiment PIP_FLAGS=                               pip's own output
#
# pip takes its index, mirrors and certificates from its own configuration and PIP_* variables.

PYTHON ?= python3
VENV := .venv
CONFIG :=
ARGS :=
PIP_FLAGS ?= --quiet --quiet

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install $(PIP_FLAGS)
RECIPE := examples/recipes/sentiment-default.yaml
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# A stamp is touched when its step is done: what is older than what it depends on is done again.
INSTALLED := $(VENV)/.installed
INSTALLED_LINT := $(VENV)/.installed-lint
INSTALLED_DOCS := $(VENV)/.installed-docs
PREPARED := .cache/default/.prepared

export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help sentiment test campaigns lint types dist docs clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s%s\n", $$1, $$2}'

sentiment: $(PREPARED)  ## fine-tune the embedded default on airline tweets (ARGS="...")
	@exec $(BIN)/lora-fsdp train $(if $(CONFIG),--accelerate_config $(CONFIG)) \
		--config $(RECIPE) $(ARGS)

# On the CPU also where there is a GPU: tests/gpu is run by name (CONTRIBUTING). Nothing is compiled
# on a CPU, and without dynamo no process imports a compiler. Two workers of one thread take a file
# each, in the order of tests/conftest.py; a file keeps to one worker, because its tests share what
# they set up.
PYTEST := HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 \
	$(BIN)/python -m pytest --quiet --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test: $(PREPARED)  ## run the tests (ARGS="-k name", ARGS=--cov with coverage)
	@echo "==> Testing"
	@$(PYTEST) -m "not slow" $(ARGS)

campaigns: $(PREPARED)  ## run the long tests that `make test` leaves out
	@echo "==> Testing what takes long"
	@$(PYTEST) -m slow $(ARGS)

lint: $(INSTALLED_LINT)  ## ruff: rules and format
	@echo "==> Linting"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

types: $(INSTALLED_LINT)  ## mypy
	@echo "==> Checking types"
	@$(BIN)/mypy lora_fsdp

dist: $(INSTALLED)  ## build the wheel and the sdist into dist/
	@echo "==> Building the wheel and the sdist"
	@$(PIP) build
	@$(BIN)/python -m build --outdir dist >/dev/null

docs: $(INSTALLED_DOCS)  ## build the documentation into site/, warnings are errors
	@echo "==> Building the documentation"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove everything made here: environment, prepared default, caches (not runs/)
	@rm -rf $(VENV) .cache site build dist *.egg-info .coverage .coverage.* htmlcov
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "There is no $(PYTHON) here; lora-fsdp needs Python 3.11 or newer:" \
			"PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "lora-fsdp needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
			"name a newer one: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "==> Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); \
		echo "$(PYTHON) cannot create a virtual environment; install its venv module" \
			"(Debian, Ubuntu: apt install python3-venv) and try again." >&2; exit 1; }

# torch goes first and by name: then no other package's requirement chooses its version.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing $(TORCH) (a large download the first time)"
	@$(PIP) -c constraints.txt $(TORCH)
	@echo "==> Installing lora-fsdp and what it needs"
	@$(PIP) -c constraints.txt -e '.[demo,test]'
	@echo "==> Installing axe-core for the tests"
	@$(PIP) --no-deps axe-playwright-python==0.1.8
	@touch $@

$(INSTALLED_LINT): $(INSTALLED)
	@echo "==> Installing ruff and mypy"
	@$(PIP) -c constraints.txt -e '.[lint]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "==> Installing mkdocs"
	@$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

$(PREPARED): $(INSTALLED)
	@echo "==> Preparing the default model and tweets (a download of 95 MB the first time)"
	@$(BIN)/lora-fsdp demo --prepare_only
	@touch $@
