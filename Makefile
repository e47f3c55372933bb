# Everything a person or CI runs. `make help` lists it.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
JOBS ?= 3

.DEFAULT_GOAL := help
.PHONY: help system install check test lab bench demo demo-vsphere lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

system: ## install the Debian packages of packages.txt (needs root; quiet when all are there)
	@./scripts/install-system-packages

$(STAMP): requirements.lock pyproject.toml
	@./scripts/make-venv $(VENV)
	@touch $@

install: system $(STAMP) ## .venv/bin/offload in this checkout, and no more than that

check: install ## ruff, mypy, unit and contract tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/unit tests/contract

test: install ## all tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	./scripts/run-tests $(JOBS)

lab: install ## a shell in the lab guest, where the kernel's own parts run
	@$(PY) -m offload.testing.lab

bench: install ## every figure of docs/benchmarks.md
	$(PY) -m bench

demo: install ## the main job on real data
	$(PY) demo/run.py

demo-vsphere: install ## placeholders on a simulated vSphere, with real iSCSI LUNs underneath
	$(PY) demo/vsphere.py

lock: ## renew requirements.lock from pyproject.toml
	./scripts/renew-lock

clean: ## remove the environment and what demo and bench made
	if [[ -x $(PY) ]]; then $(PY) demo/run.py --clean; fi
	rm -rf $(VENV) bench-work
