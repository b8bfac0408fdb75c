"""The spool: what it took is there after a kill, once, and neither damage nor a full disk costs more than it must."""

import contextlib
import gc
import logging
import random
import shutil
import signal as signals
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from otel_pg_exporter.errors import OverloadedError, StartupError
from otel_pg_exporter.model import Signal
from otel_pg_exporter.pipeline.spool import FILE_NAME, Spool
from otel_pg_exporter.pipeline.spool_file import SpoolLevel, SpoolRecord
from tests.pipeline.spools import corrupt_files, damage, made, numbers, opened, small_disk, to_drain
from tests.support import wait_until

PAGE = 4096
NOW = 1_800_000_000_000_000_000
ROOT = Path(__file__).resolve().parents[2]

_CHILD = """
import sys, threading
from pathlib import Path
from otel_pg_exporter.pipeline.spool import Spool
from tests.pipeline.spools import made
spool = Spool(Path(sys.argv[1]), max_bytes=2**30)
def run(first):
    for number in range(first, 10**6, 4):
        spool.append(made(number))
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
for first in range(4):
    threading.Thread(target=run, args=(first,)).start()
"""


def test_what_was_appended_is_there_after_the_process_was_killed(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={"PYTHONPATH": "."}
    )
    assert child.stdout is not None
    heard = [child.stdout.readline() for _ in range(200)]
    child.send_signal(signals.SIGKILL)
    heard += child.stdout.readlines()
    child.wait()
    child.stdout.close()
    acknowledged = {int(line) for line in heard if line.endswith("\n")}
    with opened(tmp_path) as spool:
        found = numbers(spool)
    assert len(found) == len(set(found))
    assert acknowledged <= set(found)
    assert len(found) <= len(acknowledged) + 4  # what was being appended may be there, too


def test_requests_that_come_together_share_an_fsync_and_each_hears_its_own_result(tmp_path: Path) -> None:
    room = 3 * made(0).size
    with opened(tmp_path, max_bytes=room) as spool, ThreadPoolExecutor(8) as pool:
        transactions: list[str] = []
        with spool._lock:  # as while another transaction is fsynced
            assert spool._file is not None
            spool._file._connection.set_trace_callback(transactions.append)
            answers = [pool.submit(spool.append, made(number)) for number in (1, 2, 3)]
            wait_for(spool, 3)
            answers += [pool.submit(spool.append, made(number)) for number in (1, 2, 4, 5)]
            wait_for(spool, 7)
        assert [answer.result(10) for answer in answers[:3]] == [True] * 3
        for answer in answers[3:]:  # a full spool is full for those, too, that it might have already
            with pytest.raises(OverloadedError, match="the spool is full"):
                answer.result(10)
        assert transactions.count("COMMIT") == 1
        assert numbers(spool) == [1, 2, 3]


def wait_for(spool: Spool, count: int) -> None:
    wait_until(lambda: len(spool._waiting) == count)


def put(spool: Spool, record: SpoolRecord) -> "weakref.ref[threading.Event]":
    """Append what is refused; return what tells whether the call is still held by its error."""
    held = threading.Event()
    with pytest.raises(OverloadedError):
        spool.append(record)
    return weakref.ref(held)


def test_a_refused_request_leaves_nothing_that_only_a_garbage_collection_frees(tmp_path: Path) -> None:
    gc.disable()
    try:
        with opened(tmp_path, max_bytes=2_000) as spool:
            assert put(spool, made(1, size=5_000))() is None
        assert put(spool, made(2))() is None
    finally:
        gc.enable()


def test_many_threads_that_append_are_all_heard(tmp_path: Path) -> None:
    with opened(tmp_path) as spool, ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda number: spool.append(made(number)), range(400)))
        assert sorted(numbers(spool)) == list(range(400))
        level = spool.level
        assert (level.requests, level.items) == (400, sum(made(number).item_count for number in range(400)))
        assert (level.bytes, level.oldest) == (400 * made(0).size, made(0).received_at)


def test_an_error_that_nobody_foresaw_reaches_all_who_wait(tmp_path: Path) -> None:
    bad = replace(made(1), received_at=2**70)
    with opened(tmp_path) as spool, ThreadPoolExecutor(3) as pool:
        with spool._lock:
            answers = [pool.submit(spool.append, record) for record in (made(0), bad, made(2))]
            wait_for(spool, 3)
        for answer in answers:
            with pytest.raises(Exception, match=r"format|too large|out of range"):
                answer.result(10)
        assert numbers(spool) == []
        assert spool.append(made(3))
        assert spool.level.requests == 1


def test_equal_requests_are_kept_once_and_their_doubt_only_rises(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        assert spool.append(made(1))
        assert not spool.append(made(1))
        assert spool.append(made(1, signal=Signal.LOGS))  # another signal's is another request
        assert [each.in_doubt_since for each in spool.following(0)] == [None, None]
        assert not spool.append(made(1, in_doubt=True))
        assert not spool.append(made(1))
        [stored] = spool.oldest(Signal.TRACES, max_items=1, max_bytes=1)
        assert stored.record is not None
        assert stored.record.in_doubt
        assert stored.in_doubt_since is not None
        assert stored.in_doubt_since <= made(1).received_at
        assert spool.level.requests == 2


def test_a_doubt_that_is_settled_leaves_another_ones_doubt_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        for number in range(3):
            spool.append(made(number, in_doubt=number == 2))
        ids = to_drain(spool)
        spool.doubt(ids, NOW)
        assert [each.in_doubt_since for each in spool.following(0)] == [NOW, NOW, made(2).received_at]
        assert not spool.append(made(1, in_doubt=True))  # a retry that PostgreSQL did not answer, meanwhile
        spool.settle_doubt(ids, NOW)
        [first, second, third] = [each.in_doubt_since for each in spool.following(0)]
        assert first is None
        assert second is not None
        assert third == made(2).received_at


def test_a_full_spool_says_how_full_it_is_and_has_room_again_after_a_removal(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=10 * made(0).size) as spool:
        for number in range(10):
            spool.append(made(number))
        with pytest.raises(OverloadedError, match=r"the spool is full: 6,120 of 6,120 bytes; 4 items refused"):
            spool.append(made(10))
        spool.remove(to_drain(spool)[:1])
        assert spool.append(made(10))
        assert numbers(spool) == list(range(1, 11))


def test_an_emptied_spool_gives_its_disk_space_back_even_if_something_was_set_aside(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        for number in range(60):
            spool.append(made(number, size=2**20))
        spool.set_aside(to_drain(spool)[17], "a reason")
        size = (tmp_path / FILE_NAME).stat().st_size
        spool.remove(to_drain(spool)[:20])
        assert (tmp_path / FILE_NAME).stat().st_size == size
        spool.remove(to_drain(spool))
        assert (tmp_path / FILE_NAME).stat().st_size < 20 * 2**20 < size
        assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size <= 8 * 2**20
        assert numbers(spool) == [17]
        assert spool.append(made(31))


def test_the_oldest_come_first_in_batches_that_keep_their_limits(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        for number in random.Random(1).sample(range(50), 50):
            spool.append(made(number, size=1000))
        spool.append(made(7, signal=Signal.LOGS))
        found = []
        while stored := spool.oldest(Signal.TRACES, max_items=10, max_bytes=4 * made(0, size=1000).size):
            records = [each.record for each in stored if each.record]
            assert len(records) == 1 or sum(record.item_count for record in records) <= 10
            assert len(records) <= 4
            found += [int.from_bytes(record.request_id, "big") for record in records]
            spool.remove([each.id for each in stored])
        assert found == list(range(50))
        assert spool.oldest(Signal.LOGS, max_items=0, max_bytes=0)  # one at least
        assert spool.oldest(Signal.LOGS, max_items=9, max_bytes=9, without=to_drain(spool, Signal.LOGS)) == []


def test_a_closed_spool_refuses_and_an_empty_one_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=10**6)
    spool.append(made(1))
    spool.remove(to_drain(spool))
    assert spool.close() == SpoolLevel()
    assert spool.close() == SpoolLevel()
    with pytest.raises(OverloadedError, match="closed"):
        spool.append(made(2))
    assert list(tmp_path.iterdir()) == []
    spool = Spool(tmp_path, max_bytes=10**6)
    spool.append(made(1))
    assert spool.close().requests == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


# Damage.


def filled(folder: Path, count: int = 100, *, killed: bool = False) -> None:
    """Leave a spool with requests of 1 KB, as a process that ends leaves it, or one that is killed."""
    spool = Spool(folder, max_bytes=2**30)
    for number in range(count):
        spool.append(made(number, size=1000))
    if killed:
        left = {path.name: path.read_bytes() for path in folder.iterdir()}
        spool.close()
        for name, data in left.items():
            (folder / name).write_bytes(data)
    else:
        spool.close()


def forget_pages(spool: Spool) -> None:
    """Empty SQLite's cache, as a larger spool would by itself."""
    assert spool._file is not None
    spool._file._connection.execute("PRAGMA shrink_memory")


def overwrite(data: bytearray) -> None:
    page = len(data) // PAGE // 2 * PAGE
    data[page : page + PAGE] = random.Random(0).randbytes(PAGE)


def cut(data: bytearray) -> None:
    del data[len(data) // 2 + 100 :]


@pytest.mark.parametrize(("harm", "least"), [(overwrite, 95), (cut, 40)])
@pytest.mark.parametrize("running", [False, True])
def test_a_damaged_file_is_set_aside_and_what_can_be_read_of_it_is_kept(
    tmp_path: Path, harm: Callable[[bytearray], None], least: int, running: bool
) -> None:
    filled(tmp_path)
    path = tmp_path / FILE_NAME
    if running:
        with opened(tmp_path) as spool:
            forget_pages(spool)
            damage(path, harm)
            damaged = path.read_bytes()
            assert numbers(spool)  # finds the damage, and is done again on the new file
            assert spool.append(made(100))
            kept = numbers(spool)
            assert {spool.items(signal) for signal in Signal} == {0, spool.level.items}
    else:
        damage(path, harm)
        damaged = path.read_bytes()
        with opened(tmp_path) as spool:
            assert spool.append(made(100))
            kept = numbers(spool)
    assert len(kept) == len(set(kept)) > least
    assert set(kept) <= set(range(101))
    [aside] = corrupt_files(tmp_path)
    assert (tmp_path / aside).read_bytes()[: len(damaged)] == damaged
    with opened(tmp_path) as spool:  # that was it: the new file is in order
        assert numbers(spool) == kept
    assert corrupt_files(tmp_path) == [aside]


def no_database(path: Path) -> None:
    path.write_bytes(b"not a database at all " * 1000)


def header(path: Path) -> None:
    filled(path.parent)
    damage(path, lambda data: data.__setitem__(slice(0, 100), bytes(100)))


def folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("something")


def link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("something")
    path.symlink_to("elsewhere")


def other_schema(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE requests (id INTEGER PRIMARY KEY, something TEXT)")
    connection.close()


def other_schema_of_our_version(path: Path) -> None:
    other_schema(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1")
    connection.close()


@pytest.mark.parametrize("harm", [no_database, header, folder, link, other_schema, other_schema_of_our_version])
def test_what_is_no_spool_is_set_aside_and_a_new_one_begun(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    harm(tmp_path / FILE_NAME)
    for number in range(2):
        with opened(tmp_path) as spool:
            assert spool.append(made(number))
            assert numbers(spool) == list(range(number + 1))
    assert len(corrupt_files(tmp_path)) == 1
    assert not (tmp_path / FILE_NAME).is_symlink()
    if harm is link:
        assert (tmp_path / "elsewhere").read_text() == "something"


def test_a_newer_schema_is_set_aside_and_its_requests_are_kept(tmp_path: Path) -> None:
    filled(tmp_path, 10)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("ALTER TABLE requests ADD COLUMN news TEXT")
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with opened(tmp_path) as spool:
        assert numbers(spool) == list(range(10))
    assert len(corrupt_files(tmp_path)) == 1


def test_an_empty_file_and_a_log_that_is_garbage_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    filled(tmp_path, 10)
    (tmp_path / f"{FILE_NAME}-wal").write_bytes(random.Random(0).randbytes(20_000))
    with opened(tmp_path) as spool:
        assert numbers(spool) == list(range(10))
        assert spool.append(made(10))
    assert corrupt_files(tmp_path) == []


def test_what_was_removed_before_damage_was_found_does_not_take_another_requests_place(tmp_path: Path) -> None:
    """The drain holds ids while it writes; those of a file that replaces a damaged one must mean the same requests."""
    filled(tmp_path, 100)
    with opened(tmp_path) as spool:
        spool.remove(to_drain(spool)[:30])
        held = [(each.id, each.record) for each in spool.oldest(Signal.TRACES, max_items=60, max_bytes=2**30)]
        forget_pages(spool)
        damage(tmp_path / FILE_NAME, overwrite)
        numbers(spool)
        assert len(corrupt_files(tmp_path)) == 1
        for number in range(100, 120):
            spool.append(made(number, size=1000))
        found = {each.id: each.record for each in spool.oldest(Signal.TRACES, max_items=10**9, max_bytes=2**30)}
        assert all(found.get(id_, record) == record for id_, record in held)
        spool.remove([id_ for id_, _ in held])
        assert set(range(100, 120)) <= set(numbers(spool))


def test_the_last_requests_id_is_not_given_again(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        spool.append(made(1))
        [first] = to_drain(spool)
        spool.remove([first])
        spool.append(made(2))
        assert to_drain(spool) != [first]


def test_a_record_whose_checksum_is_wrong_is_read_as_such_and_costs_no_other(tmp_path: Path) -> None:
    filled(tmp_path, 10)
    data = made(5, size=1000).otlp
    damage(
        tmp_path / FILE_NAME, lambda all_: all_.__setitem__(all_.index(data) + 500, all_[all_.index(data) + 500] ^ 1)
    )
    with opened(tmp_path) as spool:
        stored = spool.oldest(Signal.TRACES, max_items=10**6, max_bytes=2**30)
        assert [each.id for each in stored if each.record is None] == [stored[5].id]
        assert numbers(spool) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        spool.set_aside(stored[5].id, "its checksum is wrong")
        assert len(to_drain(spool)) == 9
        assert (spool.level.requests, spool.level.set_aside) == (10, 1)


def any_damage(chance: random.Random, data: bytearray) -> None:
    place, length = chance.randrange(len(data)), chance.choice([1, 2, 100, PAGE, 20_000])
    page = place // PAGE * PAGE
    kind = chance.randrange(6)
    if kind == 0:
        data[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        data[place : place + length] = chance.randbytes(length)
    elif kind == 2:
        data[place : place + length] = bytes(length)
    elif kind == 3:
        del data[place:]
    elif kind == 4:
        data[page : page + PAGE] = chance.randbytes(PAGE)
    else:  # what tells where things are
        for _ in range(5):
            data[min(page + chance.randrange(60), len(data) - 1)] = chance.randrange(256)


def test_a_request_whose_copy_is_damaged_is_kept_when_it_comes_again(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        assert spool.append(made(1, size=5_000, in_doubt=True))
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection, connection:
        connection.execute("UPDATE requests SET otlp = zeroblob(6000)")
    with opened(tmp_path) as spool:
        [damaged] = spool.following(0)
        assert not spool.append(made(1, size=5_000))  # its items are counted already
        spool.set_aside(damaged.id, "its checksum is wrong")  # by a drain that had read it before
        assert numbers(spool) == [1]
        assert to_drain(spool) != []
        assert spool.following(0)[0].in_doubt_since == made(1).received_at
        level = spool.level
    with opened(tmp_path) as spool:
        assert spool.level == level


def test_a_replacement_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    with opened(tmp_path) as spool:
        assert spool.append(made(1))
    (tmp_path / FILE_NAME).rename(tmp_path / f"{FILE_NAME}.new")  # filled, while the damaged one is aside already
    (tmp_path / f"{FILE_NAME}-wal").write_bytes(random.Random(1).randbytes(10_000))  # but for its log
    with opened(tmp_path) as spool:
        assert numbers(spool) == [1]
    assert [name[-4:] for name in corrupt_files(tmp_path)] == ["-wal"]


def test_whatever_the_damage_a_spool_opens_and_yields_nothing_that_was_never_put_in(tmp_path: Path) -> None:
    pristine = []
    for killed in (False, True):
        place = tmp_path / f"killed-{killed}"
        place.mkdir()
        filled(place, 60, killed=killed)
        pristine.append({path.name: path.read_bytes() for path in place.iterdir() if "reserve" not in path.name})
    outcomes: Counter[str] = Counter()
    for seed in range(120):
        chance = random.Random(seed)
        place = tmp_path / str(seed)
        place.mkdir()
        files = chance.choice(pristine)
        for name, data in files.items():
            (place / name).write_bytes(data)
        damage(place / chance.choice(sorted(files)), lambda data, chance=chance: any_damage(chance, data))  # type: ignore[misc] # mypy infers no default
        try:
            with opened(place) as spool:
                kept = numbers(spool)
                assert len(set(kept)) == len(kept)
                assert set(kept) <= set(range(60))
                spool.remove(to_drain(spool))
                assert spool.append(made(1000))
                outcomes["set aside" if corrupt_files(place) else "opened"] += 1
        except StartupError:
            outcomes["refused"] += 1
    assert outcomes["set aside"] > 5
    assert outcomes["opened"] > 5
    assert outcomes["refused"] == 0


# A disk that is full.


def fill(spool: Spool, record: Callable[[int], SpoolRecord]) -> int:
    """Append until there is no room left; return how many requests were taken."""
    number = 0
    with contextlib.suppress(OverloadedError):
        while spool.append(record(number)):
            number += 1
    return number


def occupy(path: Path) -> None:
    """Take up all that is left of a disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(PAGE)):
            pass


@pytest.mark.parametrize("size", [300, 20_000, 500_000])
def test_a_spool_that_has_filled_its_disk_is_emptied_and_works_again(tmp_path: Path, size: int) -> None:
    with small_disk(tmp_path, 20 * 2**20), opened(tmp_path) as spool:
        taken = fill(spool, lambda number: made(number, size=size))
        for number in range(10):
            with pytest.raises(OverloadedError):
                spool.append(made(taken + number, size=size))
        assert numbers(spool) == list(range(taken))  # nothing is half-written
        ids = to_drain(spool)
        while ids:
            spool.doubt(ids[:1000], NOW)
            spool.remove(ids[:1000])
            ids = ids[1000:]
        assert spool.level == SpoolLevel()
        assert spool.append(made(taken + 100, size=size))


def test_a_disk_that_others_filled_refuses_and_takes_again_once_it_has_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, 20 * 2**20), opened(tmp_path) as spool:
        spool.append(made(0))
        other = tmp_path / "other"
        occupy(other)
        taken = fill(spool, lambda number: made(1 + number, size=200_000))
        before = numbers(spool)
        assert before == list(range(1 + taken))
        other.unlink()
        assert spool.append(made(100))
        assert numbers(spool) == [*before, 100]


def test_damage_on_a_full_disk_is_mended_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path, 20 * 2**20), opened(tmp_path) as spool:
        for number in range(400):
            spool.append(made(number, size=10_000))
        other = tmp_path / "other"
        occupy(other)
        damage(tmp_path / FILE_NAME, overwrite)
        for _ in range(3):
            with pytest.raises(OverloadedError):
                numbers(spool)
        assert corrupt_files(tmp_path) == []
        other.unlink()
        assert len(numbers(spool)) > 390
        assert len(corrupt_files(tmp_path)) == 1


# A file that is deleted or moved while it is open.


def delete_the_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def delete_the_file(folder: Path) -> None:
    (folder / FILE_NAME).unlink()


def delete_the_log(folder: Path) -> None:
    (folder / f"{FILE_NAME}-wal").unlink()


def move_the_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def put_a_copy_there(folder: Path) -> None:
    move_the_folder(folder)
    shutil.copytree(folder.with_name("elsewhere"), folder)


LOSSES = [delete_the_folder, delete_the_file, delete_the_log, move_the_folder, put_a_copy_there]


@pytest.mark.parametrize("lose", LOSSES)
@pytest.mark.parametrize("found", ["new", "old"])
def test_a_file_that_is_deleted_or_moved_takes_no_more_and_can_be_emptied(
    tmp_path: Path, lose: Callable[[Path], None], found: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    if found == "old":
        with opened(folder) as spool:
            spool.append(made(0))
    with opened(folder) as spool:
        spool.append(made(0))
        spool.append(made(1))
        assert (spool.takes, spool.lost) == (True, False)
        lose(folder)
        left = sorted(folder.glob("*"))
        for number in (1, 2):
            with pytest.raises(OverloadedError, match=r"spool\.db was deleted or moved while it was in use"):
                spool.append(made(number))
        assert (spool.takes, spool.lost) == (False, True)
        assert numbers(spool) == [0, 1]
        spool.doubt(to_drain(spool), NOW)
        spool.remove(to_drain(spool))
        assert spool.level == SpoolLevel()
        assert (spool.takes, spool.lost) == (False, True)
    assert sorted(folder.glob("*")) == left  # whoever put it there
    [line] = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert "the 3 items in it are written as soon as PostgreSQL takes them, but are lost if this process ends" in line


def test_a_loss_is_noticed_by_whoever_looks_at_the_level_and_is_over_when_the_file_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    with opened(folder) as spool:
        spool.append(made(0))
        move_the_folder(folder)
        assert spool.level.requests == 1
        assert spool.lost
        folder.with_name("elsewhere").rename(folder)
        assert spool.append(made(1))
        assert (spool.takes, spool.lost) == (True, False)
    with opened(folder) as spool:
        assert numbers(spool) == [0, 1]


def test_a_lost_spool_adopts_nothing(tmp_path: Path) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
    with opened(tmp_path / "own") as own:
        other = Spool(tmp_path / "other", max_bytes=2**30)
        other.append(made(0))
        delete_the_folder(tmp_path / "own")
        assert own.adopt(other) == Counter()
        assert own.level == SpoolLevel()
    with opened(tmp_path / "other") as other:
        assert numbers(other) == [0]


# Another process's spool.


def test_an_adopted_spool_is_moved_with_what_was_set_aside(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    filled(tmp_path, 100)
    with opened(tmp_path / "own") as spool:
        spool.append(made(3, size=1000))
        other = Spool(tmp_path, max_bytes=1)
        other.set_aside(to_drain(other)[50], "a reason")
        other.doubt(to_drain(other)[:10], NOW)
        moved = sum(made(number).item_count for number in range(100) if number != 3)
        assert spool.adopt(other).total() == moved
        assert sorted(numbers(spool)) == list(range(100))
        assert spool.level.set_aside == 1
        assert [each.in_doubt_since for each in spool.following(0)].count(NOW) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_what_there_is_no_room_for_stays_with_its_old_spool(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with opened(tmp_path) as other:
        for number in range(5):
            other.append(made(number, size=10 * 2**20))
    with opened(tmp_path / "own", max_bytes=35 * 2**20) as spool:
        came = spool.adopt(Spool(tmp_path, max_bytes=1)).total()
        with opened(tmp_path) as other:
            assert sorted(numbers(spool) + numbers(other)) == [0, 1, 2, 3, 4]
            assert numbers(spool) == [0, 1, 2]
        assert came == spool.level.items
        spool.remove(to_drain(spool))
        spool.adopt(Spool(tmp_path, max_bytes=1))
        assert numbers(spool) == [3, 4]


def test_damaged_requests_of_an_adopted_spool_are_set_aside_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    filled(tmp_path, 10)
    data = made(5, size=1000).otlp
    damage(tmp_path / FILE_NAME, lambda all_: all_.__setitem__(all_.index(data), all_[all_.index(data)] ^ 1))
    with opened(tmp_path / "own") as spool:
        spool.adopt(Spool(tmp_path, max_bytes=1))
        assert numbers(spool) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    [aside] = corrupt_files(tmp_path)
    assert data[1:] in (tmp_path / aside).read_bytes()
    assert not (tmp_path / FILE_NAME).exists()


def test_an_adoption_that_fails_half_way_tells_what_came_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with opened(tmp_path) as other:
        for number in range(6):
            other.append(made(number, size=7 * 2**20))
    with small_disk(tmp_path / "own", 40 * 2**20):
        spool = Spool(tmp_path / "own", max_bytes=2**30)
        came = spool.adopt(Spool(tmp_path, max_bytes=1)).total()
        own = numbers(spool)
        assert came == spool.level.items > 0
        with opened(tmp_path) as other:
            left = numbers(other)
            assert left
            assert sorted({*own, *left}) == [0, 1, 2, 3, 4, 5]
        spool.close()


def test_a_spool_that_cannot_be_opened_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / f"{FILE_NAME}-wal").mkdir()
    with pytest.raises(StartupError, match=r"cannot be opened.*spool_dir"):
        Spool(tmp_path, max_bytes=1)
    with pytest.raises(StartupError, match="cannot be opened"):
        Spool(tmp_path / "missing", max_bytes=1)


def test_two_threads_that_read_and_write_at_once_disturb_nobody(tmp_path: Path) -> None:
    stop = threading.Event()
    drained: list[int] = []

    def drain(spool: Spool) -> None:
        while not stop.is_set() or to_drain(spool):
            stored = spool.oldest(Signal.TRACES, max_items=50, max_bytes=2**20)
            drained.extend(int.from_bytes(each.record.request_id, "big") for each in stored if each.record)
            spool.remove([each.id for each in stored])

    with opened(tmp_path) as spool, ThreadPoolExecutor(5) as pool:
        drainer = pool.submit(drain, spool)
        assert all(pool.map(lambda number: spool.append(made(number)), range(300)))
        stop.set()
        drainer.result(60)
        assert sorted(drained) == list(range(300))
        assert spool.level == SpoolLevel()
