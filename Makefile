# The two commands are `make train` and `make test`; `make help` lists the rest. They need python3 >= 3.10 and a C compiler.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
STAGE  ?= all

.DEFAULT_GOAL := help
.PHONY: help train test export readme gpu clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

# One environment; a stamp for each set of requirements, made again when they change.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: settings.ini setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: settings.ini setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/.installed

train: $(VENV)/.installed  ## train on the embedded digits; ARGS="--dataset cifar10 --epochs 30" trains on something else
	$(BIN)/convnext-train $(ARGS)

# Two notebooks at a time on two cores would fight for them: each worker gets one thread.
test: $(VENV)/.installed-dev  ## run every notebook, then pytest
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --timing
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -ra -o tmp_path_retention_policy=failed tests

export: $(VENV)/.installed-dev  ## notebooks -> package and README; badges from settings.ini
	$(BIN)/python nbs/_book.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: export  ## README.md from nbs/index.ipynb

gpu:  ## on a CUDA machine, with the Python at hand: STAGE=test|triton|bench|compile|kernels|data|cifar|best|study|ladder|all, at most 9 minutes each
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(STAGE) $(ARGS)

clean:  ## remove the environment, the runs and what building leaves
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
