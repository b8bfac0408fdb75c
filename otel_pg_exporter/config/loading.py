"""How a setting is defined, parsed and loaded; the only reader of the environment.

A setting is defined once, as a dataclass field: its name gives the flag (`--grpc-endpoint`), the environment
variable (`OTEL_PG_EXPORTER_GRPC_ENDPOINT`) and the key in the TOML file (`grpc_endpoint`); its annotation gives the
parser. Precedence: flags, then environment, then TOML file, then default. Durations are in seconds (`30d` is
understood), sizes in bytes (`64MiB`). Groups nest, names do not: no two groups share a name, and the file has no
sections.
"""

import dataclasses
import difflib
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from otel_pg_exporter.errors import ConfigurationError

T = TypeVar("T")

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SHOWN_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("", 1))
_SHOWN_PERIODS = (("d", 86_400), ("h", 3_600), ("", 1))
_PERIODS = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_PERIODS)})\s*")
# What Kubernetes tells every pod of a service, here one whose name begins with ours; and what our tests read.
_FOREIGN = re.compile(
    r"(?:\w+_)?(?:SERVICE_(?:HOST|PORT(?:_\w+)?)=|PORT_\d+_[A-Z]+(?:_\w+)?=|PORT=\w+://).*|(?:TEST|FAULT)_\w+=.*",
    re.DOTALL,
)
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def setting(
    default: Any,  # noqa: ANN401 - dataclasses.field's own shape
    help: str,  # noqa: A002 - argparse's word
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    size: bool = False,
    secret: bool = False,
) -> Any:  # noqa: ANN401 - as above
    """Declare one setting: its default, its help text, and the least and greatest value that make sense.

    What is secret is no part of its group's `repr`, which tracebacks with values (Sentry's) and debuggers show.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "size": size}
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting as the command line, the documentation and the error messages see it."""

    name: str
    kind: Any  # its annotation
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    size: bool
    group: str  # what its group is about, in a sentence; empty outside of one

    @property
    def flag(self) -> str:
        """Its flag, as `--grpc-endpoint`."""
        return "--" + self.name.replace("_", "-")

    def variable(self, prefix: str) -> str:
        """Its environment variable."""
        return prefix + self.name.upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be, if only some may."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def shown_default(self) -> str:
        """Its default as a user would write it; empty where there is none."""
        return self.shown(self.default)

    def shown(self, value: Any) -> str:  # noqa: ANN401 - of whatever kind
        """Write a value as a user would, in a variable; empty where there is none."""
        if isinstance(value, bool):
            return str(value).lower()
        if self.size:
            return next(f"{value // size}{unit}" for unit, size in _SHOWN_UNITS if value % size == 0)
        if isinstance(value, float):  # seconds
            unit, length = next((each for each in _SHOWN_PERIODS if value and value % each[1] == 0), ("", 1))
            return f"{value / length:.12g}{unit}"
        if isinstance(value, tuple):
            return _separator(typing.get_args(self.kind)[0]).join(map(str, value))
        return "" if value is None else str(value)

    def parse(self, value: object, where: str) -> object:
        """Turn a flag's, a variable's or a TOML value into the annotated type; `where` names its origin."""
        try:
            parsed = _parse(self.kind, value, size=self.size)
        except ValueError as exc:
            raise ConfigurationError(f"{where}: {redacted(str(exc))}") from None
        if self.minimum is not None and isinstance(parsed, int | float) and parsed < self.minimum:
            raise ConfigurationError(f"{where}: {value!r} is below the least value, {self.minimum:,.12g}")
        if self.maximum is not None and isinstance(parsed, int | float) and parsed > self.maximum:
            raise ConfigurationError(f"{where}: {value!r} is above the greatest value, {self.maximum:,.12g}")
        return parsed


def settings_of(cls: type, group: str = "") -> Iterator[Setting]:
    """Yield every setting of a settings class, its groups' included, in order of definition."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from settings_of(typing.cast("type", kind), group=(kind.__doc__ or "").partition("\n")[0])
        else:
            meta = field.metadata
            yield Setting(
                name=field.name,
                kind=kind,
                default=field.default,
                help=meta["help"],
                minimum=meta["minimum"],
                maximum=meta["maximum"],
                size=meta["size"],
                group=group,
            )


def load(
    cls: type[T],
    *,
    prefix: str,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> T:
    """Build a settings value. Flags that are None count as not given.

    Raises ConfigurationError, which names the flag, the variable or the file and key that is wrong.
    """
    return load_with_origins(cls, prefix=prefix, flags=flags, environ=environ, file=file)[0]


def load_with_origins(
    cls: type[T],
    *,
    prefix: str,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> tuple[T, dict[str, str]]:
    """Build a settings value as `load` does; return with it which flag, variable or key each value came from, by name.

    A setting that has its default is not among these.
    """
    environ = os.environ if environ is None else environ
    table = {} if file is None else _read_toml(file, [s.name for s in settings_of(cls)])
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for each in settings_of(cls):
        variable = each.variable(prefix)
        if flags is not None and flags.get(each.name) is not None:
            value, origin = flags[each.name], each.flag
        elif environ.get(variable, "") != "":  # OpenTelemetry: an empty variable counts as unset
            value, origin = environ[variable], variable
        elif each.name in table:
            value, origin = table[each.name], f"{file}: {each.name}"
        else:
            continue
        values[each.name], origins[each.name] = each.parse(value, origin), origin
    return build(cls, values), origins


def unknown_variables(
    *classes: type, prefix: str, others: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the variables with our prefix that are no setting of `classes`, each with a hint at the one that was meant.

    `others` are further names that mean something. Those that Kubernetes sets for a service that is named as we are,
    and those of our tests, are left out.
    """
    environ = os.environ if environ is None else environ
    known = [each.variable(prefix) for cls in classes for each in settings_of(cls)]
    known += [prefix + name for name in others]
    for name in sorted(each for each in environ if each.startswith(prefix)):
        if name not in known and not _FOREIGN.fullmatch(f"{name.removeprefix(prefix)}={environ[name]}"):
            yield name, did_you_mean(name, known, prefix=prefix)


def libpq_names_a_database(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether one of libpq's own variables says which PostgreSQL to connect to."""
    environ = os.environ if environ is None else environ
    return any(environ.get(name) for name in ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE"))


def file_of(flag: str | None, *, prefix: str, environ: Mapping[str, str] | None = None) -> Path | None:
    """Return the TOML file to read: the one that a flag names, else the environment, else none."""
    environ = os.environ if environ is None else environ
    name = flag or environ.get(prefix + "CONFIG")
    return Path(name).expanduser() if name else None


def values_of(settings: object) -> dict[str, Any]:
    """Gather a settings value and its groups into flat values by name: the inverse of `build`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast("Any", settings)):
        value = getattr(settings, field.name)
        values |= values_of(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return a hint at the known word that is closest, empty where none is close.

    `prefix` is what all of them begin with; it would make any two look alike.
    """
    names = [each.removeprefix(prefix) for each in known]
    close = difflib.get_close_matches(word.removeprefix(prefix), names, n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def duration(text: str) -> float | None:
    """Return how many seconds `500ms`, `90s`, `12h` or `30d` are; None for what has no unit or is no number."""
    match = _DURATION.fullmatch(text)
    return None if match is None else float(match[1]) * _PERIODS[match[2]]


def redacted(text: str) -> str:
    """Hide what may be a password in a DSN or URL, and what is a key, that came where none belongs."""
    text = re.sub(r"(-----BEGIN [A-Z ]+-----).*", r"\1***", text, flags=re.DOTALL)
    text = re.sub(r"://\S*@", "://***@", text)
    text = re.sub(r"\w+:[^\s/]\S*@", "***@", text)  # of a URL that lacks its scheme
    return re.sub(r"(password\s*=\s*)\S+", r"\1***", text, flags=re.IGNORECASE)


def build(cls: type[T], values: Mapping[str, object]) -> T:
    """Distribute flat, parsed values over a settings class and its groups."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, object] = {}
    for field in dataclasses.fields(typing.cast("Any", cls)):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            arguments[field.name] = build(typing.cast("type", kind), values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    return cls(**arguments)


def _read_toml(file: Path, known: Sequence[str]) -> dict[str, object]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigurationError(f"{file}: {exc.strerror or exc}") from exc
    except ValueError as exc:  # broken TOML or broken UTF-8
        raise ConfigurationError(f"{file}: not a TOML file: {exc}") from exc
    for key in table:
        if key not in known:
            hint = did_you_mean(key, known)
            if isinstance(table[key], dict):
                hint = "; settings stand at the top of the file, without sections"
            raise ConfigurationError(f"{file}: unknown setting {key!r}{hint}")
    return table


def _separator(kind: type) -> str:
    """Return what stands between the parts of a list in its variable."""
    return os.pathsep if kind is Path else ","


def _parse(kind: Any, value: object, *, size: bool) -> object:  # noqa: ANN401 - an annotation may be anything
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is none of {', '.join(arguments)}")
        return value
    if origin is tuple:
        separator = _separator(arguments[0])
        parts = value.split(separator) if isinstance(value, str) else value
        if not isinstance(parts, Sequence):
            raise ValueError(f"{value!r} is no list")
        if arguments[0] is str:  # one flag may hold several; a file's name may hold the separator
            parts = [word.strip() for part in parts for word in _text(part).split(separator)]
        return tuple(_parse(arguments[0], part, size=size) for part in parts if part != "")
    if origin is types.UnionType:  # `X | None`: None is the default alone, never written
        return _parse(arguments[0], value, size=size)
    parser: Callable[[object], object] = {
        bool: _boolean,
        float: _seconds,
        int: _size if size else _integer,
        Path: _path,
        str: _text,
    }[kind]
    return parser(value)


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    raise ValueError(f"{value!r} is neither true nor false")


def _seconds(value: object) -> float:
    try:
        period = duration(value) if isinstance(value, str) else None
        number = float(typing.cast("str", value)) if period is None else period
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{value!r} is no number of seconds (examples: 0.5, 500ms, 90s, 12h, 30d)")
    return number


def _integer(value: object) -> int:
    if not isinstance(value, bool) and re.fullmatch(r"\s*-?\d+\s*", str(value)):
        return int(str(value))
    raise ValueError(f"{value!r} is no whole number")


def _size(value: object) -> int:
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", str(value))
    if match is None or isinstance(value, bool) or match[2].lower() not in _UNITS:
        raise ValueError(f"{value!r} is no size in bytes (examples: 65536, 64MiB)")
    return int(match[1]) * _UNITS[match[2].lower()]


def _path(value: object) -> Path:
    try:
        return Path(_text(value)).expanduser()
    except RuntimeError as exc:  # `~somebody`, whom nobody knows
        raise ValueError(f"{value!r}: {exc}") from None


def _text(value: object) -> str:
    if not isinstance(value, str | Path):
        # Not repeated: whatever stands in the place of a DSN may hold a password.
        raise ValueError(f"text is wanted, not a {type(value).__name__}")  # noqa: TRY004 - one kind of error for every bad value
    if "\0" in str(value):
        raise ValueError("text must not hold a NUL character")
    return str(value)
