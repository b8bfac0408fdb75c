"""What an error means is decided by connection and SQLSTATE, never by words."""

from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from otel_pg_exporter.errors import DeploymentError, OutageError
from otel_pg_exporter.postgres.sqlstate import Verdict, classify, copy_line, is_outage, unavailable


def error(sqlstate: str | None) -> psycopg.Error:
    kind = psycopg.OperationalError if sqlstate is None else psycopg.errors.lookup(sqlstate)
    return kind("words that say nothing")


@pytest.mark.parametrize(
    ("sqlstate", "verdict"),
    [
        (None, Verdict.RETRY),
        ("08006", Verdict.RETRY),
        ("22P03", Verdict.DATA),
        ("22P05", Verdict.DATA),
        ("23505", Verdict.DUPLICATE),
        ("23514", Verdict.DATA),
        ("25006", Verdict.RETRY),
        ("08P01", Verdict.DATA),
        ("40001", Verdict.RETRY),
        ("40P01", Verdict.RETRY),
        ("42501", Verdict.DEPLOYMENT),
        ("42P01", Verdict.DEPLOYMENT),
        ("53100", Verdict.RETRY),
        ("53300", Verdict.RETRY),
        ("54000", Verdict.DATA),
        ("55P03", Verdict.RETRY),
        ("57014", Verdict.RETRY),
        ("57P01", Verdict.RETRY),
        ("P0001", Verdict.DATA),
        ("XX000", Verdict.DUPLICATE),
        ("XX001", Verdict.RETRY),
    ],
)
def test_each_class_has_its_verdict(sqlstate: str | None, verdict: Verdict) -> None:
    assert classify(error(sqlstate), broken=False) is verdict


def test_a_lost_connection_is_worth_a_retry_whatever_the_error_says() -> None:
    assert classify(error("42P01"), broken=True) is Verdict.RETRY
    assert type(unavailable(error("42P01"), phase="spans", broken=True)) is OutageError


@pytest.mark.parametrize(
    ("sqlstate", "broken", "outage"),
    [
        (None, True, True),
        ("40P01", True, True),
        ("25006", False, True),
        ("53100", False, True),
        ("40P01", False, False),
        ("55P03", False, True),
        ("57014", False, False),
        ("23505", False, False),
    ],
)
def test_an_outage_is_told_from_what_concerns_one_transaction(sqlstate: str | None, broken: bool, outage: bool) -> None:
    assert is_outage(error(sqlstate), broken=broken) is outage


def test_a_deployment_error_names_its_remedy() -> None:
    missing = unavailable(error("42P01"), phase="spans", broken=False)
    assert isinstance(missing, DeploymentError)
    assert "otel-pg-exporter migrate" in str(missing)
    assert "docs/how-to/roles.md" in str(unavailable(error("42501"), phase="spans", broken=False))


def test_a_read_only_server_is_waited_for_and_the_command_that_tells_why_is_named() -> None:
    away = unavailable(error("25006"), phase="ensure_partitions", broken=False)
    assert type(away) is OutageError
    assert "`otel-pg-exporter check` tells whether this is a standby" in away.remedy


def copy_numbers(connection: psycopg.Connection[tuple[Any, ...]], numbers: Sequence[int]) -> None:
    with connection.cursor() as cursor, cursor.copy("COPY numbers FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["int4"])
        for number in numbers:
            copy.write_row([number])


def test_the_server_names_the_row_that_a_binary_copy_failed_at(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE numbers (n int4 CHECK (n <> 3))")
        with pytest.raises(psycopg.errors.CheckViolation) as caught:
            copy_numbers(connection, [1, 2, 3, 4, 5])
    assert copy_line(caught.value) == 3


def test_without_a_context_no_row_is_named() -> None:
    assert copy_line(error("23514")) is None
