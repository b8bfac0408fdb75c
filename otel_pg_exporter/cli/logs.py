"""Log lines on stderr: text for people, JSON for machines, one line a record."""

import logging
import sys
import threading
from types import TracebackType

from pythonjsonlogger.json import JsonFormatter

from otel_pg_exporter.cli.colour import Colour
from otel_pg_exporter.cli.output import printable
from otel_pg_exporter.config import MonitoringSettings

_logger = logging.getLogger(__package__)

_COLOURS = {logging.DEBUG: "grey", logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}

# What a record calls them, and what JSON does, behind the time.
_FIELDS = {"levelname": "level", "name": "logger", "message": "message", "threadName": "thread"}


def set_up(settings: MonitoringSettings, *, attended: bool) -> None:
    """Log to stderr from now on, as the settings say; `attended`: somebody waits for the command, and reads that."""
    handler = logging.StreamHandler(sys.stderr)
    as_json = settings.log_format == "json" or (
        settings.log_format == "auto" and not attended and not sys.stderr.isatty()
    )
    handler.setFormatter(_json() if as_json else _Text(Colour("auto", sys.stderr)))
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    logging.captureWarnings(capture=True)
    # What matters of a broken connection our own lines say.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    # Else Python writes a stack trace between the lines.
    sys.excepthook = _log_end
    threading.excepthook = _log_end_of_thread


def speak_json() -> bool:
    """Tell whether a machine reads what goes to stderr."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _log_end(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    _logger.critical("ended by an unexpected error", exc_info=error)


def _log_end_of_thread(failed: threading.ExceptHookArgs) -> None:
    if failed.exc_type is not SystemExit:  # by which a thread may end itself
        name = failed.thread.name if failed.thread else "?"
        _logger.critical("the thread %s was ended by an unexpected error", name, exc_info=failed.exc_value)


def _json() -> logging.Formatter:
    return JsonFormatter(
        list(_FIELDS),
        rename_fields={**_FIELDS, "exc_info": "exception"},
        timestamp="timestamp",
        defaults={"timestamp": None},  # holds its place, the first: it is filled in last
    )


class _Text(logging.Formatter):
    """Time, level, logger and message, which nobody can make look like two; what is worth a look in colour."""

    def __init__(self, colour: Colour) -> None:
        super().__init__()
        self._colour = colour

    def usesTime(self) -> bool:  # noqa: N802 - logging's name
        return True

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        level = self._colour(f"{record.levelname:<7}", _COLOURS.get(record.levelno, ""))
        return f"{record.asctime} {level} {record.name}: {printable(record.message)}"
