# `make help` lists the targets. Everything runs from .venv, which `make setup` makes on first use.

SHELL := /bin/sh
BIN := .venv/bin
CACHE := $(or $(GPUFN_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gpufn)
# Modules are compiled once, not at each start.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: .venv/installed ## Make .venv with gpufn, every extra and the tools

.venv/installed: pyproject.toml requirements-dev.lock scripts/setup.sh
	@scripts/setup.sh

.PHONY: criu
criu: ## Put a private CRIU into ~/.local/share/gpufn/criu; the system stays as it is
	@scripts/install-criu.sh

# Where CRIU cannot be had, gpufn works without process snapshots, and its tests say so (in CI: fail).
.PHONY: try-criu
try-criu:
	@scripts/install-criu.sh || echo "make: going on without CRIU: no process snapshots" >&2

.PHONY: images
images: ## Make what the tests of images share, in ~/.cache/gpufn: base images, a Docker daemon, the buildpack lifecycle
	@scripts/install-docker.sh $(CACHE)/docker
	@scripts/install-lifecycle.sh $(CACHE)/lifecycle
	@scripts/base-image.sh --with python3-torch --lifecycle $(CACHE)/lifecycle

# They need root, Docker, Debian's tools and Go; where these are missing their tests say so (in CI: fail).
.PHONY: try-images
try-images:
	@$(MAKE) --no-print-directory images || echo "make: going on without base images: no tests of images" >&2

.PHONY: kubernetes
kubernetes: ## Build a real Kubernetes and Knative for the tests, into ~/.cache/gpufn: minutes the first time, then nothing
	@scripts/install-kubernetes.sh $(CACHE)/kubernetes

# It needs Go, and running it root and containerd; where these are missing the tests of clusters say so (in CI: fail).
.PHONY: try-kubernetes
try-kubernetes:
	@$(MAKE) --no-print-directory kubernetes || echo "make: going on without Kubernetes: no tests of clusters" >&2

.PHONY: cluster-up
cluster-up: setup kubernetes ## Start a cluster with two nodes, pretended GPUs and Knative; ARGS=--plain without Knative
	@$(BIN)/python -m tests.testbed up $(ARGS)

.PHONY: cluster-down
cluster-down: setup ## End what `make cluster-up` started
	@$(BIN)/python -m tests.testbed down

.PHONY: demo
demo: setup try-criu ## Wake a real model function from zero, plain and from its snapshot, and show the difference
	@$(BIN)/python -m scripts.demo

.PHONY: test
test: setup try-criu try-images try-kubernetes lint types imports ## Run everything: lint, types, import rules, and all tests
	$(BIN)/pytest

.PHONY: check
check: setup lint types imports ## Run the fast part: no models, no CRIU, no servers
	$(BIN)/pytest -m "not e2e and not criu and not torch and not faas_cli and not gpu and not images and not cluster"

.PHONY: gpu-test
gpu-test: setup try-criu ## Run the GPU tests on this machine's GPU, or on the simulated one, and say which
	$(BIN)/pytest -m gpu tests/gpu tests/stubs

.PHONY: lint
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: setup
	$(BIN)/mypy

.PHONY: imports
imports: setup
	@$(BIN)/lint-imports --no-logo || $(BIN)/lint-imports

.PHONY: bench
bench: setup try-criu ## Measure the bars and write benchmarks/results/MACHINE_DATE.json
	$(BIN)/python -m benchmarks $(ARGS)

.PHONY: gpu-bench
gpu-bench: setup try-criu ## Measure on this machine's GPU, under ten minutes; ARGS=--simulated runs the code without
	$(BIN)/python -m benchmarks.gpu $(ARGS)

.PHONY: fmt
fmt: setup ## Format the code and mend what lint can mend
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

.PHONY: docs
docs: setup ## Write the generated reference pages
	$(BIN)/python -m scripts.reference

.PHONY: lock
lock: setup ## Pin the development environment anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-header pyproject.toml --output-file requirements-dev.lock

.PHONY: clean
clean: ## Remove what the targets above made here; the private CRIU and functions' environments stay
	rm -rf .venv .coverage* htmlcov .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
