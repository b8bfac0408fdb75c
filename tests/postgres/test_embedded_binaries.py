"""Which PostgreSQL programs the embedded server takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from otel_pg_exporter.errors import EmbeddedServerError
from otel_pg_exporter.postgres.embedded import EmbeddedServer, find_binaries
from otel_pg_exporter.postgres.embedded_binaries import (
    candidates,
    copy_binaries,
    debian_binaries,
    major_of,
    packaged_binaries,
    server_version,
)
from tests.support import FAST


def programs(folder: Path, version: str, initdb: str = "exit 0") -> Path:
    """Fill a folder with stand-ins for the programs: a real PostgreSQL of any version is not at hand."""
    folder.chmod(0o755)
    for name, script in {"postgres": f"echo 'postgres (PostgreSQL) {version}'", "initdb": initdb}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def test_the_package_is_preferred_and_its_newest_postgresql() -> None:
    packaged = packaged_binaries()
    assert [major_of(server_version(folder)) for folder in packaged] == sorted(
        (major_of(server_version(folder)) for folder in packaged), reverse=True
    )
    assert find_binaries() == packaged[0]
    assert major_of(server_version(packaged[0])) >= 18


def test_the_packages_python_is_not_imported() -> None:
    code = (
        "import sys; from otel_pg_exporter.postgres.embedded import find_binaries; find_binaries(); "
        "print([name for name in sys.modules if 'pgserver' in name])"
    )
    assert subprocess.check_output([sys.executable, "-c", code]).decode().strip() == "[]"


def test_path_comes_after_the_package_and_before_debians_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{programs(tmp_path, '17.1')}:/usr/bin:/bin")
    assert list(candidates()) == [*packaged_binaries(), tmp_path, *debian_binaries()]


def test_a_folder_without_initdb_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (programs(tmp_path, "17.1") / "initdb").unlink()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert tmp_path not in list(candidates())


def test_the_version_of_the_data_chooses_among_those_installed(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    folders = [programs(tmp_path / "new", "18.4"), programs(tmp_path / "old", "16.14")]
    assert find_binaries(folders=folders) == tmp_path / "new"
    assert find_binaries(16, folders=folders) == tmp_path / "old"
    with pytest.raises(
        EmbeddedServerError, match=r"PostgreSQL 15, which is not installed \(18.4 in .*16.14 in "
    ) as caught:
        find_binaries(15, folders=folders)
    assert "pip install 'otel-pg-exporter[embedded]'" in str(caught.value)
    assert "apt-get install postgresql-15" in str(caught.value)


def test_programs_that_do_not_run_are_passed_over_and_named(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole").mkdir()
    broken = programs(tmp_path / "broken", "18.4")
    (broken / "postgres").write_text("#!/bin/sh\nexit 127\n")
    assert find_binaries(folders=[broken, programs(tmp_path / "whole", "16.1")]) == tmp_path / "whole"
    with pytest.raises(EmbeddedServerError, match=r"broken/postgres does not run: .*127.*: install the extra"):
        find_binaries(folders=[broken])


def test_without_any_programs_both_remedies_are_named() -> None:
    with pytest.raises(EmbeddedServerError, match=r"otel-pg-exporter\[embedded\].*PostgreSQL server.*--dsn") as caught:
        find_binaries(folders=[])
    assert "\n" not in str(caught.value)


def test_missing_programs_are_named(tmp_path: Path, open_folder: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=rf"{tmp_path}/postgres does not run: .*No such file"):
        EmbeddedServer(open_folder, binaries=tmp_path).start()


@pytest.mark.parametrize(
    ("version", "major"), [("18.4", 18), ("9.6.24", 9), ("19beta1", 19), ("17rc2", 17), ("13\n", 13)]
)
def test_a_major_version_is_the_number_in_front(version: str, major: int) -> None:
    assert major_of(version) == major


def test_a_failed_initdb_says_what_it_said_and_leaves_nothing_half_made(open_folder: Path, tmp_path: Path) -> None:
    open_folder.chmod(0o755)
    bin_folder = open_folder / "bin"
    bin_folder.mkdir()
    programs(bin_folder, "18.4", initdb="echo 'initdb: error: could not write: No space left on device'; exit 1")
    data_dir = open_folder / "data"
    with pytest.raises(EmbeddedServerError, match=r"initdb failed .*exit status 1.*\n.*No space left on device"):
        EmbeddedServer(data_dir, binaries=bin_folder).start()
    assert not (data_dir / "pgdata").exists()
    with EmbeddedServer(data_dir, settings=FAST) as server:
        assert server.pid is not None


def test_copied_programs_run_and_are_copied_once(open_folder: Path) -> None:
    source = packaged_binaries()[0]
    copy = copy_binaries(source, open_folder)
    assert server_version(copy) == server_version(source)
    written = (copy / "postgres").stat()
    assert copy_binaries(source, open_folder) == copy
    assert (copy / "postgres").stat().st_ctime_ns == written.st_ctime_ns


def test_a_copy_of_another_version_makes_room(open_folder: Path) -> None:
    (open_folder / "postgresql-17.9").mkdir()
    copy_binaries(packaged_binaries()[0], open_folder)
    assert not (open_folder / "postgresql-17.9").exists()


def test_an_installation_without_its_share_folder_cannot_be_copied(tmp_path: Path, open_folder: Path) -> None:
    (tmp_path / "bin").mkdir()
    with pytest.raises(EmbeddedServerError, match="cannot be run by the user that PostgreSQL would run as"):
        copy_binaries(programs(tmp_path / "bin", "18.4"), open_folder)
