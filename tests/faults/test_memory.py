"""Memory under floods, a small share of what `python -m tests.faults.memory` does."""

from pathlib import Path

import pytest

from tests.e2e.support import Protocol
from tests.faults.memory import KINDS, measure


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [("spans of 1 KiB", "grpc"), ("a big string", "grpc"), ("empty spans", "grpc"), ("spans of 1 KiB", "http")],
)
def test_a_flood_of_large_bodies_stays_within_bounds(dsn: str, tmp_path: Path, kind: str, protocol: Protocol) -> None:
    figures = measure(dsn, tmp_path, KINDS[kind], senders=6, size=20 * 2**20, protocol=protocol)
    assert figures.peak < 1.5 * 2**30, figures
    assert figures.heard.total() == 6
    assert figures.beside
