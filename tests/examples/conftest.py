"""A receiver for each example."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import Serving, start_serving


@pytest.fixture
def serving(dsn: str, tmp_path: Path) -> Iterator[Serving]:
    """Run `serve` on a database of its own; fail when it had anything to warn about."""
    with start_serving(tmp_path) as start:
        started = start("--ack-timeout", "30", variables={"OTEL_PG_EXPORTER_DSN": dsn})
        yield started
    assert "WARNING" not in started.stderr
    assert "ERROR" not in started.stderr
