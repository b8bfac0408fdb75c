"""How `tail` shows an item: a line for people, in columns, or an object of JSON."""

import datetime as dt
import shutil
import sys

from otel_pg_exporter.cli.colour import Colour
from otel_pg_exporter.cli.output import printable
from otel_pg_exporter.model import Signal
from otel_pg_exporter.postgres.tail import Item

_TRACE_DIGITS = 8
_WIDEST_SERVICE = 24
_COLOURS = {"debug": "grey", "trace": "grey", "warn": "yellow", "error": "red", "fatal": "magenta", "info": "green"}


class Lines:
    """Writes items as lines whose columns stand below each other; the column of services grows with their names."""

    def __init__(self, colour: Colour) -> None:
        self._colour = colour
        self._service_width = 8

    def line(self, item: Item) -> str:
        """Return one line; on a terminal no wider than that."""
        service = printable(item.service_name or "-")
        self._service_width = min(max(self._service_width, len(service)), _WIDEST_SERVICE)
        failed = item.status == "error"
        level = "SPAN" if item.signal is Signal.TRACES else (item.severity or "").upper()
        level = {"UNSPECIFIED": "LOG"}.get(level, level)
        colour = ("red" if failed else "cyan") if item.signal is Signal.TRACES else _COLOURS.get(_word(level), "")
        trace = item.trace_id.hex[:_TRACE_DIGITS] if item.trace_id else ""
        columns = [
            (f"{item.time.astimezone(dt.UTC):%H:%M:%S.%f}"[:-3], "grey"),
            (f"{level:<6}", colour),
            (f"{service[:_WIDEST_SERVICE]:<{self._service_width}}", ""),
            (f"{trace:<{_TRACE_DIGITS}}", "grey"),
            (f"{_duration(item.duration_ns):>9}", ""),
            (_text(item), "red" if failed else ""),
        ]
        return "  ".join(self._cut(columns)).rstrip()

    def _cut(self, columns: list[tuple[str, str]]) -> list[str]:
        room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        shown = []
        for text, colour in columns:
            if room is not None:
                text = text if len(text) <= room else text[: max(room - 1, 0)] + "…"[:room]  # noqa: PLW2901 - a cell
                room = max(room - len(text) - 2, 0)
            shown.append(self._colour(text, colour))
        return shown


def as_values(item: Item) -> dict[str, object]:
    """Return an item for JSON; what it has not is left out."""
    values: dict[str, object] = {
        "signal": item.signal.value,
        "time": f"{item.time.astimezone(dt.UTC):%Y-%m-%dT%H:%M:%S.%f}{item.time_ns:03}Z",
        "ingested_at": item.ingested_at.astimezone(dt.UTC).isoformat(),
        "service_name": item.service_name,
        "trace_id": item.trace_id.hex if item.trace_id else None,
        "span_id": item.span_id.hex() if item.span_id else None,
        "parent_span_id": item.parent_span_id.hex() if item.parent_span_id else None,
        "name": item.name or None,
        "kind": item.kind,
        "status": item.status,
        "status_message": item.status_message or None,
        "duration_ns": item.duration_ns,
        "severity": item.severity,
        "body": item.body,
        "attributes": item.attributes,
    }
    return {key: value for key, value in values.items() if value is not None}


def _word(level: str) -> str:
    return level.lower().rstrip("234")


def _text(item: Item) -> str:
    parts = [item.name, item.body] if item.signal is Signal.LOGS else [item.name, item.status_message]
    return printable(": ".join(part for part in parts if part))


def _duration(nanoseconds: int | None) -> str:
    if nanoseconds is None:
        return ""
    seconds = nanoseconds / 1e9
    if seconds >= 60:  # noqa: PLR2004 - a minute
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
