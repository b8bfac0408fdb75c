"""One finding, and how a check that fails itself becomes one."""

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from otel_pg_exporter.errors import ExporterError


class Grade(enum.StrEnum):
    """How good or bad a finding is."""

    OK = "ok"
    WARNING = "warning"  # it works, but not as well, as safe or as long as it should
    PROBLEM = "problem"  # `serve` would not start, or would not store what it receives


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check has found."""

    subject: str  # a word or two
    grade: Grade
    message: str
    remedy: str = ""  # a command, SQL or setting


Check = Callable[[], Iterable[Finding]]


def ok(subject: str, message: str) -> Finding:
    """Return what is as it should be."""
    return Finding(subject=subject, grade=Grade.OK, message=message)


def warning(subject: str, message: str, remedy: str = "") -> Finding:
    """Return what should be better."""
    return Finding(subject=subject, grade=Grade.WARNING, message=message, remedy=remedy)


def problem(subject: str, message: str, remedy: str = "") -> Finding:
    """Return what must be mended."""
    return Finding(subject=subject, grade=Grade.PROBLEM, message=message, remedy=remedy)


def findings_of(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Run checks, each with its subject; the failure of one is a finding, and does not keep the others from running."""
    for subject, check in checks:
        try:
            yield from check()
        except ExporterError as exc:
            yield warning(subject, f"could not be examined: {exc}")
        except Exception as exc:  # noqa: BLE001 - whatever it is, the other findings count
            yield warning(subject, f"could not be examined: {type(exc).__name__}: {exc}")
