"""The environment of a process that receives, as libpq and gRPC read it."""

import os


def prepare(*, own_postgres: bool) -> None:
    """Take from the environment what would mislead them; to be called before gRPC is imported, here or in a child."""
    if own_postgres:
        # Meant for other servers: a DSN outdoes most of libpq's variables, but not PGSERVICE.
        for name in [name for name in os.environ if name.startswith("PG")]:
            del os.environ[name]
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core logs to stderr in a form of its own
    # What gRPC does in a forked child, for its own sake, crashed one in a hundred before they became PostgreSQL.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
