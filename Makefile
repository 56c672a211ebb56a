# The two commands are `make train` and `make test`; `make help` lists the rest.
# They need python3 >= 3.10 and a C compiler.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
STAGE  ?= all
TESTS  ?= tests
PYTEST ?= $(BIN)/python -m pytest -q -ra -n 2 --dist worksteal -o tmp_path_retention_policy=failed

# What an import compiles is kept: installing goes without compiling all of 6 GB.
export PYTHONDONTWRITEBYTECODE =

# uv installs in a third of pip's time. It does not read pip's settings: it is told pip's constraints,
# and where it fails (a mirror that pip alone knows), pip installs.
PIP     = $(BIN)/python -m pip
INSTALL = { $(PIP) install --quiet uv && \
	UV_CONSTRAINT="$$($(PIP) config list | sed -n "s/.*\.constraint='\(.*\)'/\1/p")" \
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '$(1)' || \
	$(PIP) install --quiet --no-compile -e '$(1)'; }

.DEFAULT_GOAL := help
.PHONY: help train lab test lint export readme book gpu clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# One environment; a stamp for each set of requirements, made again when they change.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: settings.ini setup.py | $(BIN)/python
	$(call INSTALL,.)
	@touch $@

$(VENV)/.installed-dev: settings.ini setup.py | $(BIN)/python
	$(call INSTALL,.[dev])
	@touch $@ $(VENV)/.installed

train: $(VENV)/.installed  ## train on the embedded digits; ARGS="--dataset cifar10 --epochs 30" trains on something else
	$(BIN)/convnext-train $(ARGS)

lab: $(VENV)/.installed-dev  ## read and run the chapters in JupyterLab
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

# Two notebooks, then two tests at a time: on two cores each gets one thread. What needs a GPU or a
# network (`slow`, `cuda`) runs too: it asks first, and says what it left out.
test: $(VENV)/.installed-dev lint  ## lint, run every notebook, then pytest; TESTS=tests/test_runs.py names some
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --flags "slow cuda" --timing
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(PYTEST) $(TESTS)

lint: $(VENV)/.installed-dev  ## errors, unused names, import order, likely bugs, long lines: .ruff.toml
	$(BIN)/ruff check nbs/*.ipynb convnext_nb
	$(BIN)/ruff check --line-length 100 nbs/_book.py book tests benchmarks setup.py

export: $(VENV)/.installed-dev  ## notebooks -> package and README; badges from settings.ini
	$(BIN)/python nbs/_book.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: export  ## README.md from nbs/index.ipynb

book: $(VENV)/.installed-dev  ## the web edition, from the committed outputs: _site/index.html
	OMP_NUM_THREADS=1 $(BIN)/python book/build.py

# STAGE: test triton bench compile kernels data cifar best study ladder all
gpu:  ## on a CUDA machine, with the Python at hand: STAGE=..., at most 9 minutes each (benchmarks/gpu.py)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(STAGE) $(ARGS)

clean:  ## remove the environment, the runs and what building leaves
	rm -rf $(VENV) _site runs build dist *.egg-info .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
