# Everything happens in an environment of this clone's own; nothing else on the machine is touched.
# Works with GNU make 3.81 (macOS) and later.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check format clean benchmark FORCE

PYTHON ?= python3
WHICH_PYTHON := Say which one to take: make demo PYTHON=python3.12
ARGS ?=
CODE := src tests benchmarks

# An environment counts as ours only if it bears this mark; a `.venv` that somebody else made is left alone.
MARK := .made-by-make
ifndef VENV
VENV := $(if $(and $(wildcard .venv),$(if $(wildcard .venv/$(MARK)),,x)),.venv-make,.venv)
endif
ifneq ($(words [$(VENV)]),1)
$(error VENV must not contain spaces (the path of the clone may))
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
PINS := $(VENV)/.constraints.txt
# The choice of torch is remembered, so that `make test` after `make demo TORCH=cuda` keeps it.
TORCH ?= $(or $(shell cat $(VENV)/.torch-choice 2>/dev/null),auto)
TORCH_PIN := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS ?= $(shell [ $(CORES) -gt 8 ] && echo 8 || echo $(CORES))

# What would make pip or Python look or write elsewhere.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PYTHONSTARTUP PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_NO_DEPS
unexport PIP_DRY_RUN PIP_CONSTRAINT PIP_REQUIREMENT PIP_BREAK_SYSTEM_PACKAGES PIP_EDITABLE PIP_QUIET PIP_VERBOSE
export PIP_USER := 0
export PYTHONNOUSERSITE := 1

help: ## list these commands
	@sed -n 's/^\([a-z][a-z-]*\):[^#]*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo
	@echo "Options: PYTHON=python3.12 (which Python), VENV=folder (where to install), TORCH=cuda or TORCH='torch==2.12'"
	@echo "(which torch; default: the CPU build), JOBS=4 (test processes), ARGS='-k view' (arguments of pytest)"

demo: $(VENV)/.installed ## install into .venv and run the tour: ends with the claims and the path of the report
	@$(VENV)/bin/thalweg tour

test: $(VENV)/.installed-dev ## install with the development tools and run every test, doctests and documents included
	@$(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

check: $(VENV)/.installed-dev ## what CI wants: format, lint, types, import rules, dependencies, all tests
	@echo "check: format" && $(PY) -m ruff format --check $(CODE)
	@echo "check: lint" && $(PY) -m ruff check --no-cache $(CODE)
	@echo "check: types" && $(PY) -m mypy
	@echo "check: import rules" && $(VENV)/bin/lint-imports
	@echo "check: dependencies" && $(PIP) check
	@found=$$($(PIP) list 2>/dev/null | grep -iE '^(torchvision$(if $(filter auto,$(TORCH)),|nvidia-))' || true); \
	if [ -n "$$found" ]; then echo "Expected neither torchvision nor nvidia-*. Got:"; echo "$$found"; exit 1; fi
	@echo "check: tests, doctests, documents" && $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

format: $(VENV)/.installed-dev ## format the code and repair what the linter can repair
	@$(PY) -m ruff format $(CODE)
	@$(PY) -m ruff check --fix $(CODE)

benchmark: $(VENV)/.installed ## run every script of benchmarks/ (minutes)
	@for script in benchmarks/*.py; do echo "benchmark: $$script"; $(PY) "$$script" || exit; done

clean: ## remove the environment and the caches that make made; runs and reports stay
	@for folder in .venv .venv-make $(VENV); do if [ -e "$$folder/$(MARK)" ]; then rm -rf "$$folder"; fi; done
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A moved or copied clone would run the code of the old place: its environment is made anew.
ifneq ($(shell cat $(VENV)/$(MARK) 2>/dev/null),$(CURDIR))
$(VENV)/$(MARK): FORCE
endif
FORCE:

$(VENV)/$(MARK):
	@$(PYTHON) -c '' 2>/dev/null || \
	{ echo "Expected Python 3.11 or later. Got no working $(PYTHON). $(WHICH_PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Expected Python 3.11 or later. Got $$($(PYTHON) -V 2>&1). $(WHICH_PYTHON)" >&2; exit 1; }
	@if [ -e $(VENV) ] && [ ! -e $@ ]; then \
	echo "Expected VENV to be free, or made by make. Got $(VENV), which is neither. Choose another VENV." >&2; exit 1; fi
	@echo "environment: making $(VENV) with $$($(PYTHON) -V)"
	@rm -rf $(VENV) && mkdir -p $(VENV) && : > $@ && printf '*\n' > $(VENV)/.gitignore
	@$(PYTHON) -m venv $(VENV)
	@printf '%s\n' '$(subst ','\'',$(CURDIR))' > $@

ifneq ($(shell cat $(VENV)/.torch-choice 2>/dev/null),$(TORCH))
$(VENV)/.torch-choice: FORCE
endif
$(VENV)/.torch-choice: $(VENV)/$(MARK) constraints.txt
ifneq ($(TORCH),auto)
	@echo "torch: installing $(if $(filter cuda,$(TORCH)),the default build of the package index,$(TORCH))"
	@$(PIP) uninstall -qq -y torch
	@$(PIP) install -qq '$(if $(filter cuda,$(TORCH)),torch==$(TORCH_PIN),$(TORCH))'
else ifeq ($(shell uname -s),Linux)
	@echo "torch: installing $(TORCH_PIN), the build without CUDA (about 200 MB)"
	@$(PIP) install -qq --no-deps 'torch==$(TORCH_PIN)+cpu' >$(VENV)/torch.log 2>&1 || \
	$(PIP) install -qq --no-deps --timeout 10 --retries 1 --index-url $(TORCH_CPU_INDEX) \
	'torch==$(TORCH_PIN)+cpu' >>$(VENV)/torch.log 2>&1 || \
	{ echo "torch: found no build without CUDA (see $(VENV)/torch.log); installing the default one, several GB" && \
	$(PIP) install -qq 'torch==$(TORCH_PIN)'; }
else
	@echo "torch: installing $(TORCH_PIN)"
	@$(PIP) install -qq 'torch==$(TORCH_PIN)'
endif
	@sed '/^torch[^a-z]/d' constraints.txt > $(PINS)
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(PINS)
	@printf '%s\n' '$(TORCH)' > $@

$(VENV)/.installed: $(VENV)/.torch-choice pyproject.toml constraints.txt
	@echo "thalweg: installing it, editable, with what it needs"
	@$(PIP) install -qq -c $(PINS) -e '.[flows]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch-choice pyproject.toml constraints.txt
	@echo "thalweg: installing it, editable, with what it needs and the development tools"
	@$(PIP) install -qq -c $(PINS) -e '.[dev]'
	@touch $(VENV)/.installed $@
