"""The environment of a process that receives, as libpq, gRPC and OpenTelemetry read it, and what it may open."""

import contextlib
import os
import resource

_MOST_FILES = 65_536  # far more than are ever wanted: a hard limit may be a thousand million


def prepare(*, own_postgres: bool) -> None:
    """Take from the environment what would mislead them; to be called before gRPC is imported, here or in a child."""
    if own_postgres:
        # Meant for other servers: a DSN outdoes most of libpq's variables, but not PGSERVICE.
        for name in [name for name in os.environ if name.startswith("PG")]:
            del os.environ[name]
    # Meant for apps that share the environment: without our own metrics, no alert would ever fire.
    os.environ.pop("OTEL_SDK_DISABLED", None)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core logs to stderr in a form of its own
    # What gRPC does in a forked child, for its own sake, crashed one in a hundred before they became PostgreSQL.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    _allow_files()


def _allow_files() -> None:
    """Raise the soft limit of open files: often 1,024, for the sake of `select()`, which nothing here uses.

    Each sender's connection takes one, and without any left neither PostgreSQL nor the spool could be opened.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
