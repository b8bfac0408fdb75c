# The receiver, in a Python without compilers: `docker build -t otel-pg-exporter .`; docs/how-to/deploy.md tells the rest.

FROM python:3.13-slim-trixie AS build

# The native core takes Rust 1.85, which is Debian's here. A build for good, so no version of it is pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends cargo gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv==0.13.9

ENV UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_NO_CACHE=1 \
    UV_PROJECT_ENVIRONMENT=/opt/otel-pg-exporter
WORKDIR /src

# What is locked, before what changes more often.
COPY pyproject.toml uv.lock ./
RUN uv sync --frozen --no-dev --extra otlp-metrics --no-install-project
COPY . .
# The build goes on without a native core, as on a machine without Rust; an image is not to.
RUN uv sync --frozen --no-dev --extra otlp-metrics --no-editable \
    && /opt/otel-pg-exporter/bin/python -I -c 'import otel_pg_exporter._native'


FROM python:3.13-slim-trixie

LABEL org.opencontainers.image.title="otel-pg-exporter" \
    org.opencontainers.image.description="OpenTelemetry traces and logs in PostgreSQL: exactly once, in tables made for SQL" \
    org.opencontainers.image.licenses="Apache-2.0"

COPY --from=build /opt/otel-pg-exporter /opt/otel-pg-exporter
# The one folder that is written to: the spool, which has to outlive the container.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/otel-pg-exporter
VOLUME /var/lib/otel-pg-exporter

ENV PATH=/opt/otel-pg-exporter/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    OTEL_PG_EXPORTER_GRPC_ENDPOINT=0.0.0.0:4317 \
    OTEL_PG_EXPORTER_HTTP_ENDPOINT=0.0.0.0:4318 \
    OTEL_PG_EXPORTER_METRICS_ENDPOINT=0.0.0.0:9464 \
    OTEL_PG_EXPORTER_SPOOL_DIR=/var/lib/otel-pg-exporter/spool
EXPOSE 4317 4318 9464

# A number, so that Kubernetes can tell that it is not root.
USER 10001:10001
WORKDIR /var/lib/otel-pg-exporter
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9464/healthz', timeout=2)"]
ENTRYPOINT ["otel-pg-exporter"]
CMD ["serve"]
