"""Arguments with a form of their own: moments and positive numbers; argparse's `type`s."""

import argparse
import datetime as dt
import re
from collections.abc import Callable

from otel_pg_exporter.config import duration
from otel_pg_exporter.errors import ConfigurationError

SPELLING = (
    "a duration back from now (90m, 2h, 7d), or a timestamp (2026-11-23, 2026-11-23T12:00, in UTC unless it says)"
)


def moment(text: str) -> dt.datetime:
    """Parse a duration back from now, or an ISO timestamp."""
    try:
        if (back := duration(text)) is not None:
            return dt.datetime.now(dt.UTC) - dt.timedelta(seconds=back)
        parsed = dt.datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a duration, as 90m or 7d, nor an ISO timestamp"
        ) from None
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=dt.UTC)


def refuse_empty_time(since: dt.datetime | None, until: dt.datetime | None) -> None:
    """Raise ConfigurationError where nothing can lie between: what is found there would look like good news."""
    if since is not None and until is not None and since >= until:
        raise ConfigurationError(
            f"--since ({since:%F %T}) does not lie before --until ({until:%F %T}): nothing is between"
        )


def positive(text: str) -> int:
    """Parse a number from 1 on, as PostgreSQL's int8 holds it."""
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def seconds(least: float, most: float) -> Callable[[str], float]:
    """Return what parses a number of seconds between two."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"\d{1,9}(\.\d+)?", text) or not least <= float(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from {least} to {most:g}")
        return float(text)

    return parse
