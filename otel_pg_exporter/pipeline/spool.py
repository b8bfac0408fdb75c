"""The spool: requests that PostgreSQL did not commit in time, safe on disk until it does.

`append` returns when the request is fsynced; those that come together share one fsync. A file that is damaged is set
aside, under another name beside the new one, and what can be read of it is kept. A reserve of disk space lies beside
it, too: SQLite needs some to remove what has filled the disk. A file that somebody deletes or moves takes no more: it
lives, without a name, for as long as it is open, and until then can be emptied.
"""

import contextlib
import datetime as dt
import logging
import os
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from otel_pg_exporter.errors import OverloadedError, StartupError
from otel_pg_exporter.model import Signal
from otel_pg_exporter.pipeline.spool_file import SpoolFile, SpoolLevel, SpoolRecord, StoredRecord, read_damaged
from otel_pg_exporter.telemetry import RateLimitedLogger

R = TypeVar("R")

_logger = logging.getLogger(__name__)

FILE_NAME = "spool.db"
CORRUPT_FILES = f"{FILE_NAME}.corrupt-*"
_SIDE_FILES = ("", "-wal", "-shm")  # what SQLite finds a database by: the file's name and these
_NEW_NAME = f"{FILE_NAME}.new"  # while it is filled
_RESERVE_NAME = f"{FILE_NAME}.reserve"
_RESERVE = 8 * 2**20  # bytes; SQLite's log may take 4 MiB of the disk, and as much again to be moved into the file
_STEP = 16 * 2**20  # bytes that are moved at once


class Spool:
    """One open spool. `_lock` guards the file; any number of threads may call.

    Methods raise OverloadedError when the disk does not take or give what it should: the request is with its sender
    still, or on disk still.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Open the spool in a folder of its own. Raises StartupError."""
        self._path = folder / FILE_NAME
        self._reserve = folder / _RESERVE_NAME
        self.max_bytes = max_bytes
        """How many bytes of requests it may hold."""
        self.lost = False
        """Whether its file was found deleted or moved when it was last used."""
        self._has_room = True  # it took one of the last requests that came together, or something has left it since
        self._lock = threading.Lock()
        self._waiting: deque[tuple[SpoolRecord, Future[bool]]] = deque()
        self._notices = RateLimitedLogger(_logger)
        self._closed = False
        self._last_id = 0
        self._file: SpoolFile | None = None  # as long as a damaged one could not be replaced
        try:
            self._file = self._open()
            self._keep_reserve()
        except (OSError, sqlite3.Error) as exc:
            raise StartupError(
                f"the spool {self._path} cannot be opened: {exc}; choose another spool_dir, or do without a spool"
            ) from exc

    def close(self) -> SpoolLevel:
        """Close the file, and remove it if it is empty; return what is left. May be repeated."""
        with self._lock:
            level = SpoolLevel()
            with contextlib.suppress(OSError, OverloadedError):  # the latter is logged already, or closed
                level = self._with_file(_close)
                if not self.lost:  # else what lies there is none of ours
                    self._reserve.unlink(missing_ok=True)
                    if not level.requests:
                        _unlink(self._path)
            self._closed = True
            return level

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._path.parent

    @property
    def takes(self) -> bool:
        """Whether the next request has a good chance: there was room of late, and the file is not lost."""
        return self._has_room and not self.lost

    @property
    def level(self) -> SpoolLevel:
        """What is in the spool."""
        return self._run(lambda file: file.level)

    def items(self, signal: Signal) -> int:
        """Count the items of one signal, set aside or not."""
        return self._run(lambda file: file.items(signal))

    def append(self, record: SpoolRecord) -> bool:
        """Return True once the request is fsynced; False if it was in the spool already, and is no second time.

        Raises OverloadedError when the spool is full or lost, or cannot be written.
        """
        answer: Future[bool] = Future()
        self._waiting.append((record, answer))
        with self._lock:  # whoever gets here first writes for all who wait
            if not answer.done():
                self._append_waiting()
        try:
            return answer.result()
        finally:
            del answer  # an error that it keeps would keep this frame, and the request with it

    def adopt(self, other: "Spool") -> Counter[Signal]:
        """Take over the requests of another spool, set aside or not, and close it; return how many items came.

        What there is no room for stays where it is; if only damaged ones are left, their file is set aside.
        """
        items: Counter[Signal] = Counter()
        last = 0
        try:
            while found := other.following(last):
                last = found[-1].id
                moved = [each for each in found if each.record is not None]
                if sum(each.record.size for each in moved if each.record) > self.max_bytes - self.level.bytes:
                    return items
                items += self._run(lambda file, moved=moved: self._adopted(file, moved))  # type: ignore[misc] # mypy infers no default
                other.remove([each.id for each in moved])
        except OverloadedError:  # logged already; what was not moved stays where it is, too
            return items
        finally:
            other.close()
        other.set_file_aside()
        return items

    def following(self, id_: int) -> list[StoredRecord]:
        """Read the requests behind this id, set aside or not: some 16 MiB of them."""
        return self._run(lambda file: file.following(id_, max_bytes=_STEP))

    def oldest(
        self, signal: Signal, *, max_items: int, max_bytes: int, without: Collection[int] = ()
    ) -> list[StoredRecord]:
        """Read the oldest requests that are to be drained: one at least, unless there is none, and as many as fit."""
        return self._run(lambda file: file.oldest(signal, max_items=max_items, max_bytes=max_bytes, without=without))

    def doubt(self, ids: Collection[int], since: int) -> None:
        """Note, fsynced, that PostgreSQL may commit these requests from now on, unless it may have already."""
        self._change(lambda file: file.doubt(ids, since))

    def settle_doubt(self, ids: Collection[int], since: int) -> None:
        """Take back what `doubt` noted with the same time: PostgreSQL has not committed them."""
        self._change(lambda file: file.settle_doubt(ids, since))

    def set_aside(self, id_: int, reason: str) -> None:
        """Keep a request, but don't offer it to be drained any more."""
        self._change(lambda file: file.set_aside(id_, reason))

    def remove(self, ids: Collection[int]) -> None:
        """Forget requests; an emptied file gives its disk space back."""
        self._change(lambda file: file.remove(ids))
        self._has_room = True
        with contextlib.suppress(OverloadedError):  # logged already; the requests are gone all the same
            while self._run(lambda file: file.shrink()) and not self._waiting:
                pass
        self._keep_reserve()

    # How the file is used.

    def _append_waiting(self) -> None:
        """Write all who wait in one transaction, and tell each; the caller holds the lock."""
        taken = [self._waiting.popleft() for _ in range(len(self._waiting))]

        def add(file: SpoolFile) -> list[bool | OverloadedError]:
            self._refuse_if_lost()
            with file.transaction():
                return [self._full(file, record) or file.add(record) for record, _ in taken]

        try:
            outcomes: list[bool | BaseException] = [*self._with_file(add)]
        except BaseException as exc:  # noqa: BLE001 - whatever it is: the others wait, and each raises it
            outcomes = [exc] * len(taken)
        self._has_room = any(isinstance(outcome, bool) for outcome in outcomes)
        while taken:  # no name is to stay for an error, nor for its request, as in `append`
            _tell(taken.pop()[1], outcomes.pop())

    def _full(self, file: SpoolFile, record: SpoolRecord) -> OverloadedError | None:
        if file.bytes + record.size <= self.max_bytes:
            return None
        what = f"the spool is full: {file.bytes:,} of {self.max_bytes:,} bytes; {record.item_count:,} items refused"
        self._notices.log(logging.ERROR, "full", what)
        return OverloadedError(what)

    def _adopted(self, file: SpoolFile, moved: list[StoredRecord]) -> Counter[Signal]:
        self._refuse_if_lost()
        return _add_all(file, moved)

    def _refuse_if_lost(self) -> None:
        if self.lost:
            raise OverloadedError(f"the spool {self._path} was deleted or moved while it was in use")

    def _notice_loss(self, file: SpoolFile) -> None:
        """Look whether the file is where the next process will look for it, and say once when it is not."""
        lost, self.lost = self.lost, not file.in_place
        if self.lost and not lost:
            _logger.error(
                "the spool %s was deleted or moved while it was in use, so it takes no more requests; the %s items in"
                " it are written as soon as PostgreSQL takes them, but are lost if this process ends before: wait for"
                " that, then restart it, or move the file and its -wal back",
                self._path, f"{file.level.items:,}",
            )  # fmt: skip
        elif lost and not self.lost:
            _logger.info("the spool %s is back, and takes requests again", self._path)

    def _change(self, change: Callable[[SpoolFile], None]) -> None:
        def run(file: SpoolFile) -> None:
            with file.transaction():
                change(file)

        try:
            self._run(run)
        except OverloadedError as exc:
            if not isinstance(exc.__cause__, sqlite3.Error) or not self._reserve.exists():
                raise
            self._reserve.unlink()
            self._run(run)

    def _run(self, operation: Callable[[SpoolFile], R]) -> R:
        with self._lock:
            return self._with_file(operation)

    def _with_file(self, operation: Callable[[SpoolFile], R]) -> R:
        """Run an operation, and once more on a new file if the old one is damaged; the caller holds the lock."""
        if self._closed:
            raise OverloadedError("the spool is closed")
        try:
            file = self._file = self._file or self._open()
            self._notice_loss(file)
            try:
                return operation(file)
            except sqlite3.DatabaseError as exc:
                if not _is_damage(exc):
                    raise
                self._file, self._last_id = None, file.last_id
                with contextlib.suppress(sqlite3.Error):
                    file.close()
                self._file = self._replace(exc)
                return operation(self._file)
        except (OSError, sqlite3.Error) as exc:
            what = f"the spool {self._path} fails: {exc}"
            self._notices.log(logging.ERROR, "fails", what)
            raise OverloadedError(what) from exc

    def _open(self) -> SpoolFile:
        if self._path.is_symlink() or (self._path.exists() and not self._path.is_file()):
            aside = self.set_file_aside()
            _logger.error("%s is no file; it was set aside as %s", self._path, aside.name)
        new = self._path.with_name(_NEW_NAME)
        if not self._path.exists() and new.exists():  # `_replace` was interrupted after it had filled the new file
            self.set_file_aside()  # the damaged one's log may be left, which is none of the new one's
            _rename(new, self._path)
        try:
            return SpoolFile(self._path, last_id=self._last_id)
        except sqlite3.DatabaseError as exc:
            # An error of SQL is the schema's fault: it is somebody else's file.
            if not _is_damage(exc) and getattr(exc, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR:
                raise
            return self._replace(exc)

    def _replace(self, damage: sqlite3.Error) -> SpoolFile:
        """Set the damaged file aside, and return a new one with what can be read of it, under the ids that it had."""
        new = self._path.with_name(_NEW_NAME)
        _unlink(new)  # what an attempt that was interrupted has left
        try:
            with contextlib.closing(SpoolFile(new, last_id=self._last_id)) as file:
                items = _add_all(file, _readable(self._path), known=self._last_id)
                self._last_id = file.last_id
        except BaseException:
            _unlink(new)
            raise
        aside = self.set_file_aside()
        _rename(new, self._path)
        _logger.error(
            "the spool %s is damaged (%s); it was set aside as %s, and the %s items that could be read of it are kept",
            self._path, damage, aside.name, f"{items.total():,}",
        )  # fmt: skip
        return SpoolFile(self._path, last_id=self._last_id)

    def set_file_aside(self) -> Path:
        """Rename the closed file, if there is one, and return its new path."""
        aside = self._path.with_name(f"{FILE_NAME}.corrupt-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S.%fZ}")
        _rename(self._path, aside)
        return aside

    def _keep_reserve(self) -> None:
        """Make the reserve, if it is not there and there is room for it."""
        if self._reserve.exists():
            return
        try:
            descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, _RESERVE)
            finally:
                os.close(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                self._reserve.unlink()


def _tell(answer: Future[bool], outcome: bool | BaseException) -> None:
    if isinstance(outcome, BaseException):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _close(file: SpoolFile) -> SpoolLevel:
    level = file.level
    file.close()
    return level


def _rename(old: Path, new: Path) -> None:
    """Rename a database that is closed, if it is there; its log last, without which it would be another one."""
    for suffix in _SIDE_FILES:
        with contextlib.suppress(FileNotFoundError):
            old.with_name(old.name + suffix).rename(new.with_name(new.name + suffix))


def _unlink(path: Path) -> None:
    for suffix in _SIDE_FILES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _add_all(file: SpoolFile, stored: Iterable[StoredRecord], *, known: int = 0) -> Counter[Signal]:
    """Add requests, those with ids up to `known` under the same ones; return how many items came."""
    items: Counter[Signal] = Counter()
    with file.transaction():
        for each in stored:
            id_ = each.id if 0 < each.id <= known else None
            if each.record is not None and file.add(
                each.record, id_=id_, set_aside=each.set_aside, in_doubt_since=each.in_doubt_since
            ):
                items[each.record.signal] += each.record.item_count
    return items


def _readable(damaged: Path) -> Iterator[StoredRecord]:
    with contextlib.suppress(OSError, sqlite3.Error):
        yield from read_damaged(damaged)


def _is_damage(error: sqlite3.Error) -> bool:
    # Python raises this class itself for SQLITE_CORRUPT and SQLITE_NOTADB, and subclasses for all else.
    return type(error) is sqlite3.DatabaseError
