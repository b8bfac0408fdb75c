"""Where spools lie: private folders, one for each process, which the next one takes over and nobody else."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from otel_pg_exporter.errors import StartupError
from otel_pg_exporter.pipeline.spool import FILE_NAME, Spool
from otel_pg_exporter.pipeline.spool_folder import SpoolFolders, default_spool_dir, folder_of
from tests.pipeline.spools import made, numbers, opened

ROOT = Path(__file__).resolve().parents[2]
TARGET = "db.example:5432/telemetry otel"

# Takes a folder, and everything that dead processes have left in others; then waits, unless told to die.
_CHILD = """
import os, signal, sys
from pathlib import Path
from otel_pg_exporter.pipeline.spool import Spool
from otel_pg_exporter.pipeline.spool_folder import SpoolFolders
from tests.pipeline.spools import made
root, target, first, count = sys.argv[1:]
sys.stdin.readline()
folders = SpoolFolders(Path(root), target)
own = folders.acquire()
spool = Spool(own.path, max_bytes=2**30)
for number in range(int(first), int(first) + int(count)):
    spool.append(made(number))
for folder in folders.of_dead_processes():
    spool.adopt(Spool(folder.path, max_bytes=2**30))
    folder.release()
print(own.path, flush=True)
sys.stdin.readline()
"""


class Process:
    """Another process with a spool, killed at the end."""

    def __init__(self, root: Path, *, target: str = TARGET, first: int = 0, count: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(root), target, str(first), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "."},
        )

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def folder(self) -> Path:
        """Wait until it has taken all that it can get; return its folder."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "it has failed"
        return Path(line.strip())

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start another process, which waits for its `go`."""
    started: list[Process] = []

    def begin(root: Path, *, target: str = TARGET, first: int = 0, count: int = 0) -> Process:
        started.append(Process(root, target=target, first=first, count=count))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o177])
def test_folders_and_files_are_their_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    root = tmp_path / "state" / "spool"
    before = os.umask(umask & ~0o100)  # a umask that takes the owner's own rights is its own punishment
    try:
        folders = SpoolFolders(root, TARGET)
        folder = folders.acquire()
        with opened(folder.path) as spool:
            spool.append(made(1))
            assert {path.name: mode(path) for path in folder.path.iterdir()} == dict.fromkeys(
                (FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}.reserve", "lock"), 0o600
            )
        assert [mode(path) for path in (root, folders.path, folder.path)] == [0o700] * 3
        folder.release()
    finally:
        os.umask(before)


def test_a_folder_that_others_may_enter_is_closed_to_them(tmp_path: Path) -> None:
    place = folder_of(tmp_path, TARGET)
    place.mkdir()
    place.chmod(0o755)
    SpoolFolders(tmp_path, TARGET)
    assert mode(place) == 0o700


@pytest.mark.parametrize("what", ["root", "target"])
def test_a_symbolic_link_in_a_folders_place_is_refused(tmp_path: Path, what: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = tmp_path / "root"
    if what == "root":
        root.symlink_to(elsewhere)
    else:
        root.mkdir()
        folder_of(root, TARGET).symlink_to(elsewhere)
    with pytest.raises(StartupError, match="is a symbolic link"):
        SpoolFolders(root, TARGET)
    assert list(elsewhere.iterdir()) == []


def test_links_and_strangers_among_the_processes_folders_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    folders = SpoolFolders(tmp_path / "root", TARGET)
    (folders.path / "0-link").symlink_to(elsewhere)
    (folders.path / "0-file").touch()
    linked_lock = folders.path / "0-linked-lock"
    linked_lock.mkdir()
    (linked_lock / "lock").symlink_to(elsewhere / "lock")
    folder = folders.acquire()
    assert list(folders.of_dead_processes()) == []
    assert sorted(path.name for path in folders.path.iterdir()) == sorted(
        ["0-file", "0-link", "0-linked-lock", folder.path.name]
    )
    folder.release()


def test_a_file_in_a_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").touch()
    with pytest.raises(StartupError, match=r"is no folder|cannot be made"):
        SpoolFolders(tmp_path / "root", TARGET)
    with pytest.raises(StartupError, match="cannot be made"):
        SpoolFolders(tmp_path / "root" / "below", TARGET)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    place = folder_of(tmp_path, TARGET)
    place.mkdir(0o700)
    os.chown(place, 12_345, 12_345)
    with pytest.raises(StartupError, match=r"belongs to another user \(uid 12345\)"):
        SpoolFolders(tmp_path, TARGET)
    os.chown(place, 0, 0)
    folders = SpoolFolders(tmp_path, TARGET)
    (place / "0").mkdir()
    os.chown(place / "0", 12_345, 12_345)
    assert list(folders.of_dead_processes()) == []


def test_living_processes_never_share_a_folder_and_a_dead_ones_is_taken_next(tmp_path: Path, start: Start) -> None:
    processes = [start(tmp_path, first=10 * number, count=2) for number in range(2)]
    for process in processes:
        process.go()
    first, second = (process.folder() for process in processes)
    assert first != second
    folders = SpoolFolders(tmp_path, TARGET)
    assert list(folders.of_dead_processes()) == []
    processes[0].kill()
    folder = folders.acquire()
    assert folder.path == first
    with opened(folder.path) as spool:
        assert numbers(spool) == [0, 1]
    folder.release()


def test_another_postgresqls_requests_are_named_and_never_taken(tmp_path: Path, start: Start) -> None:
    process = start(tmp_path, target="other:5432/db otel", first=0, count=3)
    process.go()
    left = process.folder()
    folders = SpoolFolders(tmp_path, TARGET)
    assert folders.others() == []  # its process is at work
    process.kill()
    folder = folders.acquire()
    assert list(folders.of_dead_processes()) == []
    assert folders.others() == [left.parent]
    assert folder.path.parent != left.parent
    with opened(left) as spool:
        assert numbers(spool) == [0, 1, 2]
    folder.release()


def test_processes_that_start_at_once_on_many_dead_ones_share_out_each_request_once(
    tmp_path: Path, start: Start
) -> None:
    folders = SpoolFolders(tmp_path, TARGET)
    own = [folders._new() for _ in range(12)]
    for number, folder in enumerate(own):
        spool = Spool(folder.path, max_bytes=2**30)
        for request in range(5):
            spool.append(made(10 * number + request))
        spool.close()
    for folder in own:
        os.close(folder._lock)  # as the kernel does when a process dies
    processes = [start(tmp_path) for _ in range(5)]
    for process in processes:
        process.go()
    taken = {process.folder() for process in processes}
    assert len(taken) == 5
    for process in processes:
        process.kill()
    found: list[int] = []
    for path in folders.path.iterdir():
        with opened(path) as spool:
            found += numbers(spool)
    assert sorted(found) == [10 * number + request for number in range(12) for request in range(5)]


def test_threads_that_make_and_release_folders_at_once_get_one_each(tmp_path: Path) -> None:
    def use(_: int) -> Path:
        folders = SpoolFolders(tmp_path, TARGET)
        folder = folders.acquire()
        with opened(folder.path) as spool:  # SQLite's own lock would tell if it was shared
            spool.append(made(1))
            spool.remove([each.id for each in spool.following(0)])
        folder.release()
        return folder.path

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(use, range(100)))) == 100
    assert list(SpoolFolders(tmp_path, TARGET).path.iterdir()) == []


def test_a_released_folder_stays_only_if_something_is_in_it(tmp_path: Path) -> None:
    folders = SpoolFolders(tmp_path, TARGET)
    folder = folders.acquire()
    (folder.path / f"{FILE_NAME}.corrupt-1").write_text("something")
    folder.release()
    [again] = SpoolFolders(tmp_path, TARGET).of_dead_processes()
    assert again.path == folder.path
    other = folders._new()
    other.take_corrupt_files(again)
    again.release()
    assert not again.path.exists()
    assert (other.path / f"{FILE_NAME}.corrupt-1").read_text() == "something"
    other.release()


@pytest.mark.parametrize("target", ["x" * 500, "../../etc/passwd otel", "[::1]:5432/a b/c\0 otel", "ü:1/ä ö"])
def test_whatever_a_database_is_called_its_folder_lies_below_the_root(tmp_path: Path, target: str) -> None:
    path = folder_of(tmp_path, target)
    assert path.parent == tmp_path
    assert path.name.isascii()
    assert len(path.name) < 100
    assert folder_of(tmp_path, target + "x") != path
    SpoolFolders(tmp_path, target).acquire().release()


def test_a_root_that_cannot_be_written_ends_the_start_with_what_to_do() -> None:
    with pytest.raises(StartupError, match=r"cannot be made.*spool_dir"):
        SpoolFolders(Path("/proc/spool"), TARGET)


def test_a_file_system_without_locks_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_descriptor: int, _operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", without)
    folders = SpoolFolders(tmp_path, TARGET)
    with pytest.raises(StartupError, match=r"cannot be used: .*Operation not supported"):
        folders.acquire()
    assert len(list(folders.path.iterdir())) == 1


def test_root_spools_in_the_systems_state_folder_and_users_in_their_own() -> None:
    assert default_spool_dir().is_absolute()
    assert "otel-pg-exporter" in default_spool_dir().name
