"""Settings: what there is to set (`groups`), and how it is defined and loaded (`loading`)."""

from otel_pg_exporter.config.groups import (
    SDK_PREFIX,
    SERVER_PREFIX,
    CoreSettings,
    DatabaseSettings,
    ExporterSettings,
    ExporterSpoolSettings,
    MappingSettings,
    PipelineSettings,
    ReceiverSettings,
    ServeSettings,
    SpoolSettings,
    WriterSettings,
)
from otel_pg_exporter.config.loading import (
    Setting,
    build,
    file_of,
    libpq_names_a_database,
    load,
    markdown_table,
    setting,
    settings_of,
)

__all__ = [
    "SDK_PREFIX",
    "SERVER_PREFIX",
    "CoreSettings",
    "DatabaseSettings",
    "ExporterSettings",
    "ExporterSpoolSettings",
    "MappingSettings",
    "PipelineSettings",
    "ReceiverSettings",
    "ServeSettings",
    "Setting",
    "SpoolSettings",
    "WriterSettings",
    "build",
    "file_of",
    "libpq_names_a_database",
    "load",
    "markdown_table",
    "setting",
    "settings_of",
]
