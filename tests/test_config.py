from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_pg_exporter.config import (
    SDK_PREFIX,
    SERVER_PREFIX,
    ExporterSettings,
    PipelineSettings,
    ReceiverSettings,
    SecuritySettings,
    ServeSettings,
    Setting,
    available_cores,
    build,
    file_of,
    load,
    setting,
    settings_of,
)
from otel_pg_exporter.errors import ConfigurationError

SETTINGS = {each.name: each for each in settings_of(ServeSettings)}


DURATIONS = " (examples: 0.5, 500ms, 90s, 12h, 30d)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """What the group is about.

    More about it.
    """

    words: tuple[Path, ...] = setting((), "files")
    mode: Literal["fast", "safe"] = setting("safe", "how")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """Settings of a test."""

    inner: Inner = Inner()
    count: int = setting(1, "how many", minimum=1, maximum=10)
    size: int = setting(2**20, "how large", size=True)
    wait: float = setting(0.5, "seconds", minimum=0)
    on: bool = setting(False, "whether")
    folder: Path | None = setting(None, "where")
    name: str = setting("", "what")


def loaded(file: Path | None = None, flags: dict[str, object] | None = None, **environ: str) -> Outer:
    return load(Outer, prefix="X_", flags=flags, environ=environ, file=file)


def toml(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(text, encoding="utf-8")
    return file


def parse(name: str, value: object) -> object:
    return next(each for each in settings_of(Outer) if each.name == name).parse(value, "here")


def error(name: str, value: object) -> str:
    with pytest.raises(ConfigurationError, match=r"^here: ") as caught:
        parse(name, value)
    return str(caught.value)


# Where a value comes from.


def test_without_any_source_every_setting_has_its_default() -> None:
    assert load(ServeSettings, prefix=SERVER_PREFIX, environ={}) == ServeSettings()
    assert loaded() == Outer()


def test_flags_win_over_the_environment_that_over_the_file_and_that_over_the_default(tmp_path: Path) -> None:
    file = toml(tmp_path, 'count = 2\nwait = 2\nname = "file"\n')
    both = loaded(file, {"count": "4", "name": None}, X_COUNT="3", X_WAIT="3")
    assert (both.count, both.wait, both.name, both.on) == (4, 3.0, "file", False)


def test_an_empty_variable_counts_as_unset_and_an_empty_flag_does_not(tmp_path: Path) -> None:
    file = toml(tmp_path, 'name = "file"\n')
    assert loaded(file, X_NAME="").name == "file"
    assert loaded(file, {"name": ""}, X_NAME="variable").name == ""


def test_a_number_too_large_for_any_float_is_refused() -> None:
    assert error("wait", 10**400).endswith("is no number of seconds" + DURATIONS)


def test_a_group_s_settings_stand_beside_the_others(tmp_path: Path) -> None:
    file = toml(tmp_path, 'mode = "fast"\nwords = ["a.toml", "b.toml"]\non = true\n')
    assert loaded(file) == Outer(inner=Inner(mode="fast", words=(Path("a.toml"), Path("b.toml"))), on=True)
    assert loaded(X_WORDS="a.toml:b.toml").inner.words == (Path("a.toml"), Path("b.toml"))
    assert loaded(flags={"words": ["a.toml"]}).inner.words == (Path("a.toml"),)


def test_no_two_settings_share_a_name_and_none_is_named_as_kubernetes_names_services() -> None:
    for cls in (ServeSettings, ExporterSettings):
        names = [each.name for each in settings_of(cls)]
        assert len(names) == len(set(names))
    # For a service that is called otel-pg-exporter, Kubernetes sets OTEL_PG_EXPORTER_PORT=tcp://… in every pod.
    assert not [name for name in SETTINGS if name == "port" or name.startswith(("port_", "service_"))]


def test_the_file_is_named_by_the_flag_else_by_the_environment() -> None:
    environ = {"X_CONFIG": "~/variable.toml"}
    assert file_of("flag.toml", prefix="X_", environ=environ) == Path("flag.toml")
    assert file_of(None, prefix="X_", environ=environ) == Path.home() / "variable.toml"
    assert file_of(None, prefix="X_", environ={"X_CONFIG": ""}) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("90s", 90), ("1.5m", 90), ("12h", 43_200), (" 30 d ", 2_592_000), ("1w", 604_800)],
)
def test_a_duration_may_have_a_unit(text: str, seconds: float) -> None:
    assert parse("wait", text) == seconds


def test_a_variable_separates_words_by_commas_and_files_as_a_path_does() -> None:
    environ = {"OTEL_PG_EXPORTER_CORS_ORIGINS": "https://a.example,http://b.example:8080"}
    loaded = load(ServeSettings, prefix=SERVER_PREFIX, environ=environ)
    assert loaded.receiver.cors_origins == ("https://a.example", "http://b.example:8080")


def test_a_flag_of_words_may_hold_several_and_a_flag_of_files_holds_one() -> None:
    words = load(ServeSettings, prefix=SERVER_PREFIX, flags={"cors_origins": ["https://a.example, http://b:1", "*"]})
    assert words.receiver.cors_origins == ("https://a.example", "http://b:1", "*")
    files = load(ServeSettings, prefix=SERVER_PREFIX, flags={"mappings": ["a:b.toml", "c,d.toml"]})
    assert files.mapping.mappings == (Path("a:b.toml"), Path("c,d.toml"))


@pytest.mark.parametrize(
    "origin",
    [
        "app.example",
        "https://app.example/",
        "https://App.example",
        "https://app.example:443",
        "http://app.example:80",
        "https://*.example",
        "https://äpp.example",
        "null",
    ],
)
def test_an_origin_that_no_browser_sends_is_an_error(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="is no origin as browsers send it"):
        ReceiverSettings(cors_origins=("https://good.example", origin))


def test_origins_with_a_port_an_address_or_a_scheme_of_their_own_are_taken() -> None:
    for origin in ("http://localhost:3000", "http://[::1]:8080", "chrome-extension://abc", "https://app.example:8443"):
        assert ReceiverSettings(cors_origins=(origin,)).cors_origins == (origin,)


def test_a_certificate_needs_its_key_and_client_certificates_need_both() -> None:
    with pytest.raises(ConfigurationError, match="--tls-cert and --tls-key belong together"):
        ServeSettings(security=SecuritySettings(tls_cert=Path("cert.pem")))
    with pytest.raises(ConfigurationError, match=r"--tls-client-ca, .*, needs --tls-cert and --tls-key"):
        ServeSettings(security=SecuritySettings(tls_client_ca=Path("ca.pem")))


# What is wrong with a value, and where.


def test_an_error_names_the_flag_the_variable_or_the_file_and_key(tmp_path: Path) -> None:
    file = toml(tmp_path, "count = 0\n")
    with pytest.raises(ConfigurationError, match=r"^--count: '11' is above the greatest value, 10$"):
        loaded(flags={"count": "11"})
    with pytest.raises(ConfigurationError, match=r"^X_COUNT: '0' is below the least value, 1$"):
        loaded(X_COUNT="0")
    with pytest.raises(ConfigurationError, match=f"^{file}: count: 0 is below the least value, 1$"):
        loaded(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont = 1", "unknown setting 'cuont', did you mean count\\?$"),
        ("zzz = 1", "unknown setting 'zzz'$"),
        ("[inner]\nmode = 'fast'", "unknown setting 'inner'; settings stand at the top of the file, without sections$"),
        ("count = ", "not a TOML file: Invalid value"),
        ("count = 1\ncount = 2", "not a TOML file: Cannot overwrite a value"),
    ],
)
def test_a_wrong_file_is_named_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    file = toml(tmp_path, text)
    with pytest.raises(ConfigurationError, match=f"^{file}: {message}"):
        loaded(file)


def test_a_file_that_is_missing_a_folder_or_no_text_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"^{tmp_path / 'none.toml'}: No such file or directory$"):
        loaded(tmp_path / "none.toml")
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}: Is a directory$"):
        loaded(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match=f"^{binary}: .* can't decode"):
        loaded(binary)


def test_what_stands_in_the_place_of_a_text_is_not_repeated() -> None:
    assert "s3cret" not in error("name", {"password": "s3cret"})
    assert error("name", 5) == "here: text is wanted, not a int"
    assert error("name", "a\0b") == "here: text must not hold a NUL character"
    assert error("folder", "a\0b") == "here: text must not hold a NUL character"


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        ("count", " 7 ", 7),
        ("count", 7, 7),
        ("size", "64MiB", 64 * 2**20),
        ("size", "1 kB", 1000),
        ("size", "2gib", 2**31),
        ("size", 65536, 65536),
        ("wait", "1e-3", 0.001),
        ("wait", 2, 2.0),
        ("on", "TRUE", True),
        ("on", "off", False),
        ("on", True, True),
        ("mode", "fast", "fast"),
        ("folder", "~/data", Path.home() / "data"),
        ("folder", Path("/data"), Path("/data")),
        ("words", "", ()),
    ],
)
def test_values_are_read_from_text_and_from_toml(name: str, value: object, parsed: object) -> None:
    found = parse(name, value)
    assert found == parsed
    assert type(found) is type(parsed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", "1.5", "'1.5' is no whole number"),
        ("count", "1_000", "'1_000' is no whole number"),
        ("count", True, "True is no whole number"),
        ("size", "64 MiBs", "'64 MiBs' is no size in bytes (examples: 65536, 64MiB)"),
        ("size", "-1", "'-1' is no size in bytes (examples: 65536, 64MiB)"),
        ("wait", "soon", "'soon' is no number of seconds" + DURATIONS),
        ("wait", "nan", "'nan' is no number of seconds" + DURATIONS),
        ("wait", "inf", "'inf' is no number of seconds" + DURATIONS),
        ("wait", [1], "[1] is no number of seconds" + DURATIONS),
        ("wait", False, "False is no number of seconds" + DURATIONS),
        ("on", "maybe", "'maybe' is neither true nor false"),
        ("on", 1, "1 is neither true nor false"),
        ("mode", "slow", "'slow' is none of fast, safe"),
        ("mode", ["fast"], "['fast'] is none of fast, safe"),
        ("words", 5, "5 is no list"),
        ("words", [5], "text is wanted, not a int"),
        ("folder", "~nobody-of-this-name/x", "'~nobody-of-this-name/x': Could not determine home directory."),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_the_reason(name: str, value: object, message: str) -> None:
    assert error(name, value) == f"here: {message}"


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(SETTINGS)), anything)
def test_any_value_is_either_of_its_setting_s_kind_and_range_or_a_configuration_error(name: str, value: object) -> None:
    each = SETTINGS[name]
    try:
        parsed = each.parse(value, "here")
    except ConfigurationError as exc:
        assert str(exc).startswith("here: ")  # noqa: PT017 - either is right
    else:
        with suppress(ConfigurationError):  # it may contradict another setting's default
            build(ServeSettings, {name: parsed})
        assert each.minimum is None or parsed >= each.minimum  # type: ignore[operator] # only numbers have one
        assert each.maximum is None or parsed <= each.maximum  # type: ignore[operator] # as above


def test_there_are_as_many_writers_as_cores_within_reason_unless_a_number_is_given() -> None:
    assert PipelineSettings().writer_count == min(max(2, available_cores()), 8)
    assert PipelineSettings(writers=1).writer_count == 1


# How settings are shown.


def test_every_number_has_bounds_which_its_default_keeps() -> None:
    for each in (*settings_of(ServeSettings), *settings_of(ExporterSettings)):
        if each.kind in (int, float):
            assert each.minimum is not None, each.name
            assert each.maximum is not None, each.name
            assert each.minimum <= each.default <= each.maximum


@pytest.mark.parametrize("each", SETTINGS.values(), ids=SETTINGS)
def test_a_default_is_shown_as_it_may_be_written(each: Setting) -> None:
    if each.shown_default:
        assert each.parse(each.shown_default, "here") == each.default
    else:
        assert each.default in ("", (), None)


def test_a_setting_knows_its_flag_its_variable_and_its_group() -> None:
    mode = next(each for each in settings_of(Outer) if each.name == "mode")
    assert (mode.flag, mode.variable("X_"), mode.group) == ("--mode", "X_MODE", "What the group is about.")
    assert mode.choices == ("fast", "safe")
    assert SETTINGS["grpc_endpoint"].flag == "--grpc-endpoint"
    assert SETTINGS["grpc_endpoint"].variable(SDK_PREFIX) == "OTEL_EXPORTER_POSTGRESQL_GRPC_ENDPOINT"
    assert SETTINGS["data_dir"].group == ""
