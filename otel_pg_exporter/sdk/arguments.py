"""The exporters' keyword arguments: those of `ExporterSettings`, above the environment.

They are also the keys that the SDK's declarative configuration file accepts below `postgresql:`.
"""

import difflib
import inspect
from collections.abc import Mapping

from otel_pg_exporter import config
from otel_pg_exporter.config import SDK_PREFIX, ExporterSettings, settings_of
from otel_pg_exporter.errors import ConfigurationError


def settings_from(arguments: Mapping[str, object]) -> ExporterSettings:
    """Parse keyword arguments; what is missing or None comes from the environment, else is the default.

    Raises ConfigurationError, which names the argument or the variable that is wrong, or if nothing names a PostgreSQL.
    """
    known = {setting.name: setting for setting in settings_of(ExporterSettings)}
    given: dict[str, object] = {}
    for name, value in arguments.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise ConfigurationError(f"the PostgreSQL exporter has no setting {name!r}{hint}")
        if value is not None:
            given[name] = known[name].parse(value, f"the PostgreSQL exporter's setting {name!r}")
    settings = config.load(ExporterSettings, prefix=SDK_PREFIX, flags=given)
    # libpq would try a local socket and the user's own database, which is hardly ever meant.
    if not settings.database.dsn and not config.libpq_names_a_database():
        raise ConfigurationError(
            "no DSN: set OTEL_EXPORTER_POSTGRESQL_DSN or dsn= (or libpq's PGHOST, PGSERVICE or PGDATABASE)"
        )
    return settings


def signature() -> inspect.Signature:
    """Return the exporters' signature, as help() shows it."""
    return inspect.Signature(
        [
            inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=setting.kind)
            for setting in settings_of(ExporterSettings)
        ]
    )
