# `make` alone says what there is. Needs Python 3.11 or newer with pip; everything else is installed into .venv.
PYTHON ?= python3
# Every run of a study is a process of its own: without compiled bytecode each would spend 20 s on compiling imports.
unexport PYTHONDONTWRITEBYTECODE
PIP := .venv/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt --editable
FAULTS := --out results/reference/bench/faults.json --markdown docs/faults.md
CORE := .venv/.core
TEST := .venv/.test
DEV := .venv/.dev
EVAL := .venv/.eval
SDIST := .venv/.sdist

.PHONY: help env study test test-all faults check clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

env: $(CORE)  ## create .venv and install the package with the pinned constraints

study: $(CORE)  ## the main job: train QIES beside the transformer on real text, write results/quick/report.html
	.venv/bin/qies study --preset quick

test: $(TEST)  ## the test suite
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadscope

test-all: $(EVAL) $(SDIST)  ## the test suite with the slow checks, and the tests that transformers runs on its models
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadscope -m ""

faults: $(TEST)  ## inject faults into real runs, write docs/faults.md (make faults FAULTS=--quick: a few of each)
	OMP_NUM_THREADS=1 PYTHONPATH=tests .venv/bin/python -m faults $(FAULTS)

check: $(DEV)  ## ruff and mypy
	.venv/bin/ruff check src tests
	.venv/bin/ruff format --check src tests
	.venv/bin/mypy

clean:  ## delete .venv (results stay)
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "QIES needs Python 3.11 or newer; try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv

$(CORE): .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes the first time)"
	$(INSTALL) .
	@touch $@

$(TEST): $(CORE)
	$(INSTALL) '.[test]'
	@touch $@

$(EVAL): $(TEST)
	$(INSTALL) '.[test,eval]'
	@touch $@

$(SDIST): $(CORE)  # the pinned transformers with its tests, which the wheel lacks; nothing of it is built or installed
	$(PIP) download --quiet --no-deps --no-binary transformers --constraint constraints.txt --dest .venv/sdist transformers
	@touch $@

$(DEV): $(TEST)
	$(INSTALL) '.[dev]'
	@touch $@
