"""The exporters' messages on stderr, where OpenTelemetry's logging handler would be their only reader.

Python prints warnings itself as long as no handler is set up. OpenTelemetry's handler ends that, but shows nobody
anything: it hands our messages to an exporter of ours, which leaves them out.
"""

import logging

_logger = logging.getLogger(__name__.partition(".")[0])


def ensure() -> None:
    """Print this package's warnings on stderr from now on, unless a handler of the application takes them."""
    _logger.addHandler(_HANDLER)  # a second time does nothing


class _LastResort(logging.Handler):
    """Does for this package's records what Python's own `logging.lastResort` does where there is no handler."""

    def emit(self, record: logging.LogRecord) -> None:
        stderr = logging.lastResort
        if stderr is not None and record.levelno >= stderr.level and not _is_taken(record):
            stderr.handle(record)


_HANDLER = _LastResort()


def _is_taken(record: logging.LogRecord) -> bool:
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        if any(record.levelno >= each.level and not _is_invisible(each) for each in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def _is_invisible(handler: logging.Handler) -> bool:
    # By module: OpenTelemetry has the handler twice, in the SDK and in a package that need not be installed.
    origins = {each.__module__.partition(".")[0] for each in type(handler).__mro__}
    return handler is _HANDLER or "opentelemetry" in origins
