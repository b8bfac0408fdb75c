import inspect
from pathlib import Path

import pytest

from otel_pg_exporter.config import ExporterSettings, settings_of
from otel_pg_exporter.errors import ConfigurationError
from otel_pg_exporter.sdk import PostgresLogRecordExporter, PostgresSpanExporter
from otel_pg_exporter.sdk.arguments import settings_from

EXPORTERS = [PostgresSpanExporter, PostgresLogRecordExporter]
DSN = "postgresql://u@192.0.2.1:1/nowhere"
Exporter = type[PostgresSpanExporter] | type[PostgresLogRecordExporter]


def test_an_argument_beats_the_environment_and_the_environment_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_POSTGRESQL_SCHEMA", "from_environment")
    monkeypatch.setenv("OTEL_EXPORTER_POSTGRESQL_TIMEOUT", "3.5")
    settings = settings_from({"dsn": DSN, "schema": "from_argument", "connect_timeout": None})
    assert settings.database.schema == "from_argument"
    assert settings.timeout == 3.5
    assert settings.database.connect_timeout == ExporterSettings().database.connect_timeout


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dns": "x"}, "no setting 'dns'; did you mean 'dsn'"),
        ({"timeout": "soon"}, "'timeout': 'soon' is no number of seconds"),
        ({"timeout": 0}, "'timeout': 0 is below the least value"),
        ({"write_method": "magic"}, "'write_method': 'magic' is none of auto, copy, insert"),
        ({"dsn": "postgresql://u:s3cret@h/db?nonsense"}, "the DSN is malformed"),
        ({"mappings": ["/nowhere/mine.toml"]}, "/nowhere/mine.toml"),
    ],
)
def test_a_bad_argument_is_refused_by_the_constructor_by_its_name(
    exporter: Exporter, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        exporter(**{"dsn": DSN} | arguments)
    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_bad_variable_is_refused_by_the_constructor_by_its_name(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_POSTGRESQL_LOCK_TIMEOUT", "never")
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_POSTGRESQL_LOCK_TIMEOUT: 'never'"):
        exporter()


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("arguments", [{}, {"dsn": None}, {"dsn": ""}])
def test_a_forgotten_dsn_is_refused_by_the_constructor(exporter: Exporter, arguments: dict[str, str | None]) -> None:
    with pytest.raises(ConfigurationError, match="no DSN: set OTEL_EXPORTER_POSTGRESQL_DSN or dsn="):
        exporter(**arguments)


@pytest.mark.parametrize("variable", ["PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE"])
def test_a_variable_of_libpq_that_names_the_postgresql_does_for_a_dsn(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "telemetry")
    assert settings_from({}).database.dsn == ""
    monkeypatch.setenv(variable, "")
    with pytest.raises(ConfigurationError, match="no DSN"):
        settings_from({})


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_signature_names_every_setting(exporter: Exporter) -> None:
    names = list(inspect.signature(exporter).parameters)
    assert names == [setting.name for setting in settings_of(ExporterSettings)]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_constructor_does_not_connect(exporter: Exporter) -> None:
    exporter(dsn=DSN).shutdown()


def test_a_users_mapping_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('table = "spans"\n[[column]]\nname = "user name"\ntype = "text"\nfrom = "nonsense"\n')
    with pytest.raises(ConfigurationError, match=r"mine\.toml"):
        PostgresSpanExporter(dsn=DSN, mappings=[file])
