# `make run` starts the receiver with its own PostgreSQL, `make test` runs every check. Both set up what they need in
# this folder (.venv, and .uv where uv is missing); Python 3.11 or newer is all they ask for.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help run test lint lint-native unit unit-native fuzz-native test-system test-pgbouncer test-packaging faults build bench bench-end-to-end fuzz quickstarts docs docs-serve docs-reference audit setup clean

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
SYNC = uv=$$(.ci/uv) && UV_PYTHON_DOWNLOADS=never "$$uv" sync --frozen --quiet --extra embedded \
	$(if $(OTHER_RUST),--reinstall-package otel-pg-exporter)
# Rust that comes later, or a newer one, builds the core that was left out; uv by itself looks at the sources alone.
RUST := $(shell cargo --version 2>/dev/null)
OTHER_RUST := $(if $(RUST),$(shell echo '$(RUST)' | cmp -s - .venv/.rust || echo .venv/.other-rust))
NATIVE = $(wildcard native/Cargo.* native/src/*.rs native/src/*/*.rs)
SAY = what=Updating; [ -e $@ ] || what='First run: installing'; \
	echo "$$what what it needs in .venv, and building the native core where there is Rust; up to 2 minutes" >&2
PYTEST = .venv/bin/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

help:
	@echo 'make run [ARGS="--grpc-endpoint 0.0.0.0:4317"]   start the receiver; ARGS go to `otel-pg-exporter serve`'
	@echo 'make test                                        lint, types, rooms, and all tests on a real PostgreSQL'
	@echo 'make lint | unit | test-system                   parts of it; test-system takes Debian'"'"'s PostgreSQL'
	@echo 'make test-packaging                              what is shipped, built and installed'
	@echo 'make test-pgbouncer                              ingest through a PgBouncer, where one is installed'
	@echo 'make faults [ROUNDS=10]                          each fault as often, under load; `make test` has one round'
	@echo 'make bench                                       the ladder of write methods, as ratios; and both cores'
	@echo 'make bench-end-to-end [ARGS="--quick"]           from OTLP to COMMIT: half an hour'
	@echo 'make fuzz [SECONDS=600]                          hostile bytes for the decoder, for so long and then some'
	@echo 'make fuzz-native [SECONDS=600]                   the same for the native core alone'
	@echo 'make quickstarts [LANGS="node go"]                the examples in all languages that have their tools here'
	@echo 'make docs | docs-serve                           the documentation as a site: in site/, on 127.0.0.1:8000'
	@echo 'make docs-reference                              write the generated parts of docs/ anew'
	@echo 'make audit                                       known vulnerabilities of what is locked; asks public services'
	@echo 'make build                                       wheel and sdist, in dist/'

run: .venv/.run
	@exec .venv/bin/otel-pg-exporter serve $(ARGS)

test: lint unit

# The native core's own checks; only where there are cargo and the crates, since all else works without them.
CRATE = --locked --manifest-path native/Cargo.toml
WITH_CRATE = if ! cargo fetch --quiet $(CRATE) 2>/dev/null; then echo 'native/: no cargo, or no crates: left out'; else

lint: .venv/.dev lint-native
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

lint-native:
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || exit 0; \
		$(WITH_CRATE) set -x; cargo fmt --check --manifest-path native/Cargo.toml \
		&& cargo clippy --quiet $(CRATE) --all-targets --features python -- -D warnings; fi

# All tests run on the native core where there is one; those of transcoding then on the reference, too.
unit: .venv/.dev unit-native
	$(PYTEST)
	if .venv/bin/otel-pg-exporter --version | grep -q native; then OTEL_PG_EXPORTER_CORE=python $(PYTEST) $(TRANSCODING); fi

TRANSCODING = tests/transcode tests/fuzz/test_corpus.py tests/fuzz/test_decoder.py tests/postgres/test_traces.py \
	tests/postgres/test_writer.py

unit-native:
	@$(WITH_CRATE) set -x; cargo test --quiet $(CRATE); fi

test-system: .venv/.dev
	OTEL_PG_EXPORTER_TEST_PG=system $(PYTEST) tests/postgres tests/e2e tests/faults tests/test_cookbook.py

# Ingest through a PgBouncer that pools by transaction.
test-pgbouncer: .venv/.dev
	OTEL_PG_EXPORTER_TEST_PGBOUNCER=1 $(PYTEST) tests/postgres/test_writer.py tests/postgres/test_pgbouncer.py tests/e2e \
		tests/faults/test_pgbouncer.py tests/sdk/test_exporters.py tests/sdk/test_outages.py tests/sdk/test_spool.py

faults: .venv/.dev
	OTEL_PG_EXPORTER_FAULT_ROUNDS=$(ROUNDS) $(PYTEST) tests/faults

build: .venv/.dev
	rm -rf dist
	uv=$$(.ci/uv) && UV_PYTHON_DOWNLOADS=never "$$uv" build --quiet --python .venv/bin/python
	@ls dist

# Builds and installs what is shipped, which compiles the native core twice.
test-packaging: .venv/.dev
	$(PYTEST) tests/test_packaging.py -m packaging

audit: .venv/.dev
	@.ci/audit

bench: .venv/.dev
	.venv/bin/python benchmarks/transcode.py
	.venv/bin/python benchmarks/ladder.py $(ARGS)

# From OTLP to COMMIT, script by script; alone on the machine, or the figures are worth nothing.
END_TO_END ?= floor cost protocols latency memory dedup genai sdk growth
bench-end-to-end: .venv/.dev
	for each in $(END_TO_END); do .venv/bin/python benchmarks/$$each.py $(ARGS) || exit 1; done

fuzz-native:
	native/fuzz/run $(SECONDS)

fuzz: .venv/.dev
	.venv/bin/python -m tests.fuzz.run --seconds $(SECONDS)
	$(PYTEST) tests/fuzz --hypothesis-profile=fuzz --timeout=0

# What has no toolchain or no registry here is left out, and named at the end.
LANGS ?= python node go java collector
quickstarts: .venv/.dev
	.venv/bin/pytest tests/examples -n 4 -m "$$(printf "quickstart(language='%s') or " $(LANGS))quickstart(language='')"

# Broken links and anchors end the build.
docs: .venv/.dev
	.venv/bin/python docs/site.py build/docs
	.venv/bin/zensical build --clean --strict

docs-serve: .venv/.dev
	.venv/bin/python docs/site.py build/docs
	.venv/bin/zensical serve --dev-addr 127.0.0.1:8000

docs-reference: .venv/.dev
	.venv/bin/python docs/generate.py

setup: .venv/.dev

clean:
	rm -rf .venv .uv build dist site .cache *.egg-info native/target otel_pg_exporter/_native*.so

# What `run` needs, without the developers' tools; it takes nothing away that is there.
.venv/.run: pyproject.toml uv.lock $(NATIVE) $(OTHER_RUST)
	@$(SAY)
	@$(SYNC) --no-dev --inexact
	@echo '$(RUST)' > .venv/.rust
	@touch $@

.venv/.dev: pyproject.toml uv.lock $(NATIVE) $(OTHER_RUST)
	@$(SAY)
	@$(SYNC)
	@echo '$(RUST)' > .venv/.rust
	@touch $@ .venv/.run

# Never there, so whatever waits for it is made anew.
.venv/.other-rust:
	@:
