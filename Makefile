# Everything from nothing: an environment in .venv, the package built as a wheel and installed into it.
#
#   make test                       lint, types, native warnings, tests, examples, a minute of soak
#   make soak SOAK_ARGS="--seconds 600 --seed 7"
#   make demo                       a real sentence encoder under a quarter of its weights
#   make bench                      the measurements (a GPU where there is one)
#   make sanitize                   the native core under ASan and UBSan, lying producers among its tests
#   make PYTHON=python3.12 test     another interpreter; .venv is made anew for it
#   make test PYTEST_ARGS="-k view" fewer tests
#
# A machine without a GPU can spare itself torch's CUDA libraries:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=
SOAK_ARGS ?= --seconds 60

TORCH := torch==2.13.0
JAX := "jax==0.10.2; python_version < '3.12'" "jax>=0.10.2; python_version >= '3.12'"

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

# What is tested is the wheel that would ship, warnings as errors, never the source tree beside it: PYTHONSAFEPATH keeps
# the current directory off sys.path, in the tests' own subprocesses too, and --import-mode=importlib adds nothing to it.
# An editable install would hide a file missing from the wheel, and would need the build tools at every import.
RUN := PYTHONSAFEPATH=1 $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip -qq

PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
MADE := $(VENV)/.stamp-python-$(PYTHON_VERSION)
WHEEL := $(VENV)/.stamp-wheel
INSTALLED := $(VENV)/.stamp-installed
SOURCES := $(shell find dlpoffload native -not -name '__pycache__' -not -name '*.pyc' -not -name '*.so')

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile

$(MADE):
	@test -n "$(PYTHON_VERSION)" || { echo "$(PYTHON) does not run; say make PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
	@echo "==> $(VENV): a new environment with Python $(PYTHON_VERSION)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dlpoffload needs Python 3.11 or newer; say make PYTHON=python3.x")'
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(WHEEL): $(MADE) $(SOURCES) pyproject.toml $(wildcard README.md) LICENSE
	@echo "==> the wheel: native core with -Wall -Wextra -Wpedantic -Werror"
	@rm -rf $(VENV)/wheels
	@CFLAGS="$${CFLAGS:-} -Wall -Wextra -Wpedantic -Werror" $(PIP) wheel --no-deps --wheel-dir $(VENV)/wheels .
	@touch $@

$(INSTALLED): $(WHEEL) Makefile
	@echo "==> install: the wheel with torch, jax and the test and demo tools"
	@wheel=$$(ls $(VENV)/wheels/dlpoffload-*.whl); \
	 $(PIP) install "$$wheel[test,torch,jax,demo]" $(TORCH) $(JAX); \
	 $(PIP) install --no-deps --force-reinstall "$$wheel"
	@touch $@

.PHONY: install
install: $(INSTALLED)

.PHONY: lint
lint: $(INSTALLED)
	@echo "==> ruff"
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

.PHONY: types
types: $(INSTALLED)
	@echo "==> mypy --strict"
	@$(RUN) -m mypy --strict dlpoffload

.PHONY: pytest
pytest: $(INSTALLED)
	@echo "==> pytest: unit, fuzz, interchange, torch, jax, gpu, examples"
	@$(RUN) -m pytest --import-mode=importlib -n auto --maxprocesses 4 tests $(PYTEST_ARGS)

.PHONY: soak
soak: $(INSTALLED)
	@echo "==> soak: tests/gpu/soak.py"
	@$(RUN) tests/gpu/soak.py $(SOAK_ARGS)

.PHONY: test
test: lint types pytest

.PHONY: demo
demo: $(INSTALLED)
	@echo "==> demo: examples/minilm.py"
	@$(RUN) examples/minilm.py $(DEMO_ARGS)

.PHONY: bench
bench: $(INSTALLED)
	@echo "==> bench: tests/gpu/run_all.py"
	@$(RUN) tests/gpu/run_all.py

.PHONY: sanitize
sanitize: $(INSTALLED)
	@echo "==> sanitize: the native core under ASan and UBSan"
	@PYTHON=$(CURDIR)/$(VENV)/bin/python bash native/sanitize.sh

.PHONY: clean
clean:
	@echo "==> clean: $(VENV), build products, caches"
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis out
	@find dlpoffload tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -f dlpoffload/_native*.so
