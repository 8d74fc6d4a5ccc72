# `make demo` and `make test` do all the set-up by themselves; a second run starts in seconds.
# TORCH=torch==2.11.0 make test    uses another torch; PYTHON=python3.12 another interpreter.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export OMP_WAIT_POLICY := passive# spinning worker threads make small steps up to 15 times slower on shared cores
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)

.PHONY: build test quick demo bench docs lint types dist-check format
build: .venv/built

.venv/ready: pyproject.toml # without .pyc files, which take 50 s: those that are needed come with the first import
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13" "numpy<2.4"
	touch $@

.venv/built: .venv/ready $(SOURCES)
	$(BIN)/pip install -q --no-compile --no-build-isolation --config-settings editable_mode=compat -e ".[demo,dev,docs]"
	touch $@

test: build
	$(BIN)/python -m pytest -n 2

quick: build # about 1 minute on two cores: two parametrizations of every test of every room that is not slow
	$(BIN)/python -m pytest -q -n 2 --quick

demo: build
	$(BIN)/projgrad demo

bench: build
	$(BIN)/python -m pytest bench --benchmark-only

docs: build # the site, in out/site; nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*

types: build # the public names, as a type checker sees them
	$(BIN)/mypy

dist-check: build # sdist and wheels, with and without a compiler, installed and tried where only torch is
	$(BIN)/python .ci/dist_check.py

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*
