"""Files with certificates and credentials, followed while the process runs."""

import contextlib
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from otel_pg_exporter.errors import ConfigurationError

T = TypeVar("T")

LOOK_INTERVAL = 1.0  # seconds between two looks at the files

_LARGEST = 2**20  # bytes of one: ten thousand tokens, or some hundred certificates


class FollowedFiles(Generic[T]):
    """What some files say, made anew when they change; a change that is wrong leaves what was made before in force.

    The contents are compared, not the files' times: so links that are swapped (Kubernetes), clocks that jump and files
    that are put in place with an old date make no difference. `value` may be read by any thread, at any time; `look`
    is for one thread.
    """

    def __init__(self, paths: Mapping[str, Path], make: Callable[[Mapping[str, bytes]], T]) -> None:
        """Read the files, named by their settings, and hand their contents to `make`; both raise ConfigurationError."""
        self._paths = paths
        self._make = make
        self._current = _read(paths)
        self._seen: Mapping[str, bytes] | str = self._current
        self.value = make(self._current)

    def look(self) -> bool:
        """Take over what has changed, and tell whether; raise ConfigurationError for what cannot be taken over.

        Only what two looks in a row find alike: files that are being written, or replaced one after the other, are
        let alone until they are done.
        """
        found: Mapping[str, bytes] | str
        try:
            found = _read(self._paths)
        except ConfigurationError as exc:
            found = str(exc)
        settled, self._seen = found == self._seen, found
        if not settled or found == self._current:
            return False
        try:
            if isinstance(found, str):
                raise ConfigurationError(found)  # noqa: TRY301 - one remark for both
            self.value = self._make(found)
        except ConfigurationError as exc:
            raise ConfigurationError(f"{exc}; what was read before stays in force") from exc
        self._current = found
        return True


def exposed(setting: str, path: Path) -> Iterator[str]:
    """Yield a warning if every user of the machine can read a file that holds secrets."""
    with contextlib.suppress(OSError):  # it has gone again
        if path.stat().st_mode & stat.S_IROTH:
            yield f"{setting}: every user of this machine can read {path}; `chmod o-r` it"


def _read(paths: Mapping[str, Path]) -> Mapping[str, bytes]:
    contents = {}
    for setting, path in paths.items():
        try:
            with path.open("rb") as file:
                contents[setting] = file.read(_LARGEST + 1)
        except OSError as exc:
            raise ConfigurationError(f"{setting}: cannot read {_name(path)}: {exc.strerror or exc}") from exc
        if len(contents[setting]) > _LARGEST:
            raise ConfigurationError(f"{setting}: {path} has more than {_LARGEST:,} bytes")
    return contents


def _name(path: Path) -> str:
    """Name a file that cannot be read; not where it may be the secret itself, by mistake."""
    with contextlib.suppress(OSError):  # too long a name, for one
        if path.is_absolute() or path.exists() or (path.parent != Path() and path.parent.is_dir()):
            return str(path)
    return "a file of that name, which is not repeated since it may be the secret itself"
