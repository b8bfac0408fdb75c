"""The cookbook's queries, run on telemetry that came in through both front doors."""

import datetime as dt
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from otel_pg_exporter.postgres.embedded import EmbeddedServer
from tests import sample

ROOT = Path(__file__).parents[1]
COOKBOOK = ROOT / "docs" / "how-to" / "cookbook.md"
DAYS = 40  # of partitions in the past; no query looks back as far

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A question, and the statements that answer it."""

    heading: str
    statements: list[str]
    commands: list[str]


def recipes() -> list[Recipe]:
    """Return the cookbook's recipes, those that only prepare others among them."""
    sections = re.split(r"^##+ ", COOKBOOK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [
        Recipe(
            heading=section.partition("\n")[0],
            statements=[
                statement
                for block in blocks(section, "sql")
                for statement in re.split(r";$", runnable(block), flags=re.MULTILINE)
                if statement.strip()
            ],
            commands=blocks(section, "sh"),
        )
        for section in sections
    ]


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)


def runnable(query: str) -> str:
    """Put in place of Grafana's macros what Grafana does."""
    query = re.sub(r"\$__timeFilter\((\w+)\)", r"\1 BETWEEN $__timeFrom() AND $__timeTo()", query)
    return query.replace("$__timeFrom()", "(now() - interval '1 hour')").replace("$__timeTo()", "now()")


class Kitchen:
    """A connection on which recipes are tried; what they create is gone at the end."""

    def __init__(self, connection: psycopg.Connection[Row]) -> None:
        self._connection = connection

    def run(self, statement: str) -> list[Row] | None:
        """Return the rows of a statement; None if it is none that gives rows."""
        cursor = self._connection.execute(statement.encode())
        return None if cursor.description is None else cursor.fetchall()

    def days_read(self, statement: str) -> set[dt.date]:
        """Return the days of the partitions that PostgreSQL opens for a statement."""
        plan = "\n".join(str(row["QUERY PLAN"]) for row in self.run(f"EXPLAIN {statement}") or ())
        names = re.findall(r"\b(?:spans|logs)_p(\d{8})\b", plan)
        return {dt.datetime.strptime(name, "%Y%m%d").replace(tzinfo=dt.UTC).date() for name in names}

    def reach(self, statement: str) -> dt.date:
        """Return the earliest day that a statement may ask for: that of its longest interval, or the day before."""
        intervals = re.findall(r"interval '([^']+)'", statement) or ["0"]
        longest = ", ".join(f"interval '{each}'" for each in intervals)
        row = self._connection.execute(
            f"SELECT now() - greatest({longest}) - interval '1 day' AS earliest".encode()
        ).fetchone()
        assert row is not None
        earliest: dt.datetime = row["earliest"]
        return earliest.astimezone(dt.UTC).date()

    def answer(self, heading: str) -> list[Row]:
        """Return the rows of a recipe that has one query."""
        (recipe,) = (each for each in recipes() if each.heading == heading)
        return self.run(recipe.statements[0]) or []


@pytest.fixture(scope="session")  # of a module's, xdist may take one twice: it mixes the modules
def filled(server: EmbeddedServer, migrated: str) -> str:
    """Return the DSN of a database with the sample in it."""
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE cookbook TEMPLATE {migrated}".encode())
    dsn = server.url("cookbook")
    sample.fill(dsn)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT otel.ensure_partitions(current_date - %s, current_date)", [DAYS])
        connection.execute("ANALYZE")
    return dsn


@pytest.fixture
def kitchen(filled: str) -> Iterator[Kitchen]:
    with psycopg.connect(filled, row_factory=dict_row) as connection:
        for recipe in recipes():
            if recipe.heading == "With tables of your own":
                for statement in recipe.statements:
                    connection.execute(statement.encode())
        yield Kitchen(connection)
        connection.rollback()


def test_every_query_answers_its_question_and_reads_the_days_it_asks_for_alone(kitchen: Kitchen) -> None:
    assert len(kitchen.days_read("SELECT FROM otel.spans")) > DAYS  # what a query without a condition would read
    asked = 0
    for recipe in recipes():
        for statement in recipe.statements if recipe.heading != "With tables of your own" else ():
            rows = kitchen.run(statement)
            if rows is not None:
                asked += 1
                assert rows, f"{recipe.heading}: no rows"
                days = kitchen.days_read(statement)
                assert not days or min(days) >= kitchen.reach(statement), f"{recipe.heading}: reads {min(days)}"
    assert asked >= 50


def test_the_commands_write_what_other_programs_read(filled: str, binaries: Path, tmp_path: Path) -> None:
    for recipe in recipes():
        for commands in recipe.commands:
            subprocess.run(
                ["bash", "-eu", "-c", commands],
                cwd=tmp_path,
                env={**os.environ, "DSN": filled, "PATH": os.pathsep.join([os.environ["PATH"], str(binaries)])},
                timeout=60,
                check=True,
            )
    assert (tmp_path / "usage.csv").read_text().startswith("day,provider,model,")
    assert '"service_name": "shop"' in (tmp_path / "spans.jsonl").read_text()


def test_errors_lead_to_their_cause(kitchen: Kitchen) -> None:
    failing = {
        (row["service_name"], row["operation"]): row
        for row in kitchen.answer("Which services fail, and with what message?")
    }
    assert failing["payments", "POST /charge"]["last_message"] == "BankError: bank timed out"
    assert "no space left on device" in {row["status_message"] for row in kitchen.answer("Which errors are new?")}
    assert "the bank refused" not in {row["status_message"] for row in kitchen.answer("Which errors are new?")}
    tree = kitchen.answer("What happened in a trace?")
    assert [(row["service_name"], row["operation"]) for row in tree] == [
        ("shop", "POST /orders"),
        ("shop", "  SELECT stock"),
        ("shop", "  POST /charge"),
        ("payments", "    POST /charge"),
    ]
    assert [row["event"] for row in kitchen.answer("What events do its spans have?")] == [
        "stock reserved",
        *["exception"] * 3,
    ]
    assert [row["body"] for row in kitchen.answer("What was logged in it?")] == ["no answer from the bank for order 13"]


def test_loops_and_retries_are_found(kitchen: Kitchen) -> None:
    (repeated,) = kitchen.answer("Where is one query done over and over (N+1)?")
    assert (repeated["operation"], repeated["repeated"], repeated["most_times"]) == ("POST /orders", "SELECT items", 12)
    (retried,) = kitchen.answer("What is tried again?")
    assert retried["failed_attempts"] == retried["succeeded_later"] > 0
    assert [row["service_names"] for row in kitchen.answer("Which traces are incomplete?")] == [["mail"]]


def test_releases_are_compared(kitchen: Kitchen) -> None:
    versions = {row["version"] for row in kitchen.answer("Is the new release better than the old one?")}
    assert versions == {sample.OLD, sample.NEW}
    running = kitchen.answer("Which versions run, and since when?")
    first = {row["version"]: row["first_seen"] for row in running if row["service_name"] == "shop"}
    assert first[sample.OLD] < first[sample.NEW]


def test_a_gap_and_a_slow_minute_stand_out(kitchen: Kitchen) -> None:
    missing = len(kitchen.answer("Does telemetry arrive without gaps?"))
    assert len(sample.GAP) <= missing <= len(sample.GAP) + 2  # the fill may have begun in another minute
    assert "shop" in {row["service_name"] for row in kitchen.answer("Which minutes are out of the ordinary?")}


def test_tokens_and_dollars_are_those_of_the_calls(kitchen: Kitchen) -> None:
    tokens = kitchen.answer("How many calls and tokens, by day and model?")
    talks = kitchen.answer("What are the conversations about, and how long are they?")
    users = kitchen.answer("Who uses most tokens?")
    assert sum(row["input_tokens"] for row in talks) == sum(row["input_tokens"] for row in tokens)
    assert sum(row["input_tokens"] for row in users) == sum(row["input_tokens"] for row in tokens)
    assert {row["user_id"] for row in users} == {"u-17", "u-23", "u-31"}
    assert all(0 < row["dollars"] < 1 for row in kitchen.answer("What do they cost?"))
    assert {row["conversation"]: row["questions"] for row in talks} == {
        "conv-5f21": 2,
        "conv-83c0": 1,
        "conv-a94e": 2,
        "conv-e7d2": 1,
    }
    assert [row["finish_reason"] for row in kitchen.answer("What was said, word for word?")] == [
        "tool_call",
        None,
        "stop",
    ]
    (failed,) = kitchen.answer("Which calls failed, and which model answered instead?")
    assert (failed["model"], failed["answered_by"]) == ("claude-haiku-4-5", "gpt-5-mini")


def test_own_tables_join(kitchen: Kitchen) -> None:
    plans = kitchen.answer("How does each plan of ours fare?")
    assert [(row["plan"], row["customers"]) for row in plans] == [("free", 2), ("gold", 2)]


def test_ingest_tells_on_itself(kitchen: Kitchen) -> None:
    assert [row["items"] for row in kitchen.answer("What was refused, and why?")] == [1]
    assert [row["anomalies"] for row in kitchen.answer("What was repaired on the way in?")] == [["text_repaired"]]
    assert [row["operation"] for row in kitchen.answer("What lies outside the daily partitions?")] == ["at the epoch"]


def test_the_readme_shows_what_its_queries_return(kitchen: Kitchen) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Then ask")[2].partition("\n## ")[0]
    shown = re.findall(r"^(SELECT .*?);\n\n([^\n]+)\n", text, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    for statement, header in shown:
        rows = kitchen.run(statement)
        assert rows
        assert list(rows[0]) == [name.strip() for name in header.split("|")]
