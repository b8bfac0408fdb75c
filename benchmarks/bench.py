"""What every part of a run works with: the tables, the workload, and how much of it."""

from dataclasses import dataclass

from benchmarks.server import Database
from benchmarks.workload import Workload
from otel_pg_exporter.postgres.connection import Connection, Connections


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much work a run puts into its figures."""

    sizes: tuple[int, ...]  # rows a batch
    rows: int  # that a rung writes in a round, at least one batch
    slow_rows: int  # the same, for rungs that write row by row
    rounds: int  # of them, slow rungs take part in the first, third, …
    tiny_sizes: tuple[int, ...]
    tiny_transactions: int  # for each tiny size and method
    duplicate_sizes: tuple[int, ...]
    isolation_rows: int
    profile_rows: int


DEFAULT = Effort(
    sizes=(100, 1_000, 5_000, 10_000),
    rows=10_000,
    slow_rows=1_000,
    rounds=5,
    tiny_sizes=(1, 2, 5, 10, 20, 50, 100),
    tiny_transactions=150,
    duplicate_sizes=(1_000, 10_000),
    isolation_rows=10_000,
    profile_rows=10_000,
)
QUICK = Effort(
    sizes=(20, 200),
    rows=400,
    slow_rows=100,
    rounds=1,
    tiny_sizes=(1, 10),
    tiny_transactions=5,
    duplicate_sizes=(100,),
    isolation_rows=200,
    profile_rows=200,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A run."""

    database: Database
    connection: Connection  # psycopg's, with its defaults
    pool: Connections  # ours, for one writer
    workload: Workload
    effort: Effort
