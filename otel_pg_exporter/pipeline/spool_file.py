"""The spool's file: requests in one SQLite database, each with a checksum; the statements, and nothing else.

WAL with `synchronous=FULL`: a transaction that is committed is fsynced. The file belongs to one connection, which
locks it, so that SQLite needs no shared memory (that would be mapped, and a full disk ends processes which write to
such a mapping). Errors are sqlite3's; `Spool` says what they mean.
"""

import datetime as dt
import hashlib
import os
import sqlite3
import struct
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from otel_pg_exporter.model import RowBatch, Signal

_OVERHEAD = 512  # bytes that a request takes beside its OTLP: header, index entries, its share of half-filled pages
_SHRINK_ABOVE = 16 * 2**20  # bytes of an emptied file that are worth giving back, and are given back at once
_VERSION = 1  # of the schema
# The moment before which PostgreSQL has not committed a request that is not in doubt. It takes as many bytes as any
# other, for SQLite then changes it in place; else it would write the whole request anew.
_NEVER = 2**63 - 1
_LARGEST_ID = 2**62  # ids are counted up from 1, so a larger one is damage

_SETTINGS = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_size_limit = 4194304;
PRAGMA synchronous = FULL;
PRAGMA secure_delete = OFF; -- some builds overwrite what is removed, which takes room that a full disk has not
"""
_SCHEMA = f"""
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
CREATE TABLE requests (
    id INTEGER PRIMARY KEY,
    signal TEXT NOT NULL,
    request_id BLOB NOT NULL,
    received_at INTEGER NOT NULL, -- nanoseconds since the epoch
    item_count INTEGER NOT NULL,
    in_doubt_since INTEGER NOT NULL, -- when PostgreSQL may first have committed it, as above
    set_aside TEXT, -- why it is not to be drained
    checksum BLOB NOT NULL,
    otlp BLOB NOT NULL,
    UNIQUE (signal, request_id)
);
CREATE INDEX requests_to_drain ON requests (signal, received_at, id) WHERE set_aside IS NULL;
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_COLUMNS = "id, signal, request_id, received_at, item_count, in_doubt_since, set_aside, checksum, otlp"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolRecord:
    """One request as it is spooled: what it needs to be written later as it would have been at once."""

    signal: Signal
    request_id: bytes
    received_at: int  # ns since the epoch
    item_count: int
    in_doubt: bool  # PostgreSQL may have committed it already, after it was received
    otlp: bytes

    @classmethod
    def of(cls, batch: RowBatch, otlp: bytes, *, in_doubt: bool) -> Self:
        """Make the record of a request that was transcoded."""
        return cls(
            signal=batch.signal,
            request_id=batch.request_id,
            received_at=batch.received_at,
            item_count=batch.item_count,
            in_doubt=in_doubt,
            otlp=otlp,
        )

    @property
    def size(self) -> int:
        """How many bytes it is reckoned to take on disk."""
        return len(self.otlp) + _OVERHEAD

    @property
    def checksum(self) -> bytes:
        """BLAKE2b-128 of all that never changes."""
        header = struct.pack("!16sqq", self.request_id, self.received_at, self.item_count)
        return hashlib.blake2b(self.signal.value.encode() + header + self.otlp, digest_size=16).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecord:
    """A record that was read back."""

    id: int
    record: SpoolRecord | None  # None: its checksum is wrong
    set_aside: str | None
    in_doubt_since: int | None  # ns since the epoch: when PostgreSQL may first have committed it


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolLevel:
    """What a spool holds."""

    bytes: int = 0
    requests: int = 0
    items: int = 0
    set_aside: int = 0  # of the requests: kept, but not drained
    oldest: int | None = None  # receipt of the oldest request to drain, in ns since the epoch

    def __str__(self) -> str:
        """Say it in a log line."""
        aside = f", {self.set_aside:,} of them set aside" if self.set_aside else ""
        since = (
            f", the oldest of {dt.datetime.fromtimestamp(self.oldest / 1e9, dt.UTC):%F %T} UTC" if self.oldest else ""
        )
        return f"{self.items:,} items in {self.requests:,} requests{aside}{since}; {self.bytes:,} bytes"


class SpoolFile:
    """An open file; one thread at a time. Every method may raise sqlite3.Error."""

    def __init__(self, path: Path, *, last_id: int = 0) -> None:
        """Open the file, or make it with mode 0600; no request that is added gets an id up to `last_id`.

        Raises sqlite3.DatabaseError also when its pages are damaged, or when it is no file of ours.
        """
        # Made here, since SQLite would make it as the umask says; its other files take its mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        self._connection = _connected(path)
        try:
            self._connection.executescript(_SETTINGS)
            self._prepare()
            self._check()
            self._figures = Counter(self._sums("TRUE"))
            # Never given twice while the file is open: what is done about an id is done about that request.
            self.last_id = max(last_id, self._figure("SELECT max(id) FROM requests") or 0)
            # SQLite keeps both for as long as they are open; what is committed may be in the log alone.
            self._places = {each: _identity(each) for each in (path, path.with_name(f"{path.name}-wal"))}
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file; what is in the write-ahead log moves into it."""
        self._connection.close()

    @property
    def in_place(self) -> bool:
        """Whether who looks for the file and its log by their names would find those that are open."""
        return all(_identity(path) == opened for path, opened in self._places.items())

    @property
    def level(self) -> SpoolLevel:
        """What the file holds; all of it is counted along, but for `oldest`, which an index finds."""
        # Asked by signal, as the index is sorted: its whole length would take 0.1 s in a spool of a GiB.
        query = "SELECT min(received_at) FROM requests WHERE set_aside IS NULL AND signal = ?"
        found = (self._figure(query, signal.value) for signal in Signal)
        return SpoolLevel(**self._figures, oldest=min((each for each in found if each is not None), default=None))

    @property
    def bytes(self) -> int:
        """How many bytes the file is reckoned to take."""
        return self._figures["bytes"]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit, with an fsync, what happens inside, or nothing of it."""
        before = self._figures.copy()
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            self._figures = before
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def add(
        self,
        record: SpoolRecord,
        *,
        id_: int | None = None,
        set_aside: str | None = None,
        in_doubt_since: int | None = None,
    ) -> bool:
        """Add a request and return True; if it is there already, note at most that it is in doubt.

        A request in doubt is so since its receipt, unless a moment is given. One that is there but damaged is replaced.
        """
        if id_ is None:
            id_ = self.last_id + 1
        self.last_id = max(self.last_id, id_)
        if in_doubt_since is None:
            in_doubt_since = record.received_at if record.in_doubt else _NEVER
        added = self._connection.execute(
            f"INSERT INTO requests ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (
                id_,
                record.signal.value,
                record.request_id,
                record.received_at,
                record.item_count,
                in_doubt_since,
                set_aside,
                record.checksum,
                record.otlp,
            ),
        )
        if added.rowcount == 1:
            self._figures.update(_figures(1, record.item_count, int(set_aside is not None), len(record.otlp)))
            return True
        there = self._like(record)
        if there is not None and there.record is None:  # while this one is whole, and will be acknowledged as such
            self.remove([there.id])
            self.add(record, in_doubt_since=min(in_doubt_since, _moment(there.in_doubt_since)))
        elif in_doubt_since != _NEVER:
            # One less in any case: then `settle_doubt` by another, who knows but the time that was there, lets it be.
            self._connection.execute(
                "UPDATE requests SET in_doubt_since = min(in_doubt_since, ?1) - 1"
                " WHERE signal = ?2 AND request_id = ?3",
                (in_doubt_since, record.signal.value, record.request_id),
            )
        return False

    def _like(self, record: SpoolRecord) -> StoredRecord | None:
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM requests WHERE signal = ? AND request_id = ?",
            (record.signal.value, record.request_id),
        ).fetchall()
        return _stored(rows[0]) if rows else None

    def items(self, signal: Signal) -> int:
        """Count the items of one signal, set aside or not."""
        return self._figure(f"SELECT sum(item_count) FROM requests WHERE signal = '{signal.value}'") or 0

    def oldest(
        self, signal: Signal, *, max_items: int, max_bytes: int, without: Collection[int] = ()
    ) -> list[StoredRecord]:
        """Read the oldest requests that are to be drained: one at least, and as many as fit the limits."""
        if not self._figures["requests"]:  # as almost always
            return []
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM requests"
            f" WHERE set_aside IS NULL AND signal = ? AND id NOT IN ({_listed(without)}) ORDER BY received_at, id",
            (signal.value,),
        )
        return _take(rows, max_items=max_items, max_bytes=max_bytes)

    def following(self, id_: int, *, max_bytes: int) -> list[StoredRecord]:
        """Read the requests behind this id, set aside or not: one at least, and as many as fit."""
        rows = self._connection.execute(f"SELECT {_COLUMNS} FROM requests WHERE id > ? ORDER BY id", (id_,))
        return _take(rows, max_items=sys.maxsize, max_bytes=max_bytes)

    def doubt(self, ids: Collection[int], since: int) -> None:
        """Note that PostgreSQL may commit these requests from now on, unless it may have already."""
        self._replace_doubt(ids, _NEVER, since)

    def settle_doubt(self, ids: Collection[int], since: int) -> None:
        """Note that PostgreSQL has not committed these requests, unless it may have at another time."""
        self._replace_doubt(ids, since, _NEVER)

    def _replace_doubt(self, ids: Collection[int], old: int, new: int) -> None:
        self._connection.execute(
            f"UPDATE requests SET in_doubt_since = ? WHERE in_doubt_since = ? AND id IN ({_listed(ids)})", (new, old)
        )

    def set_aside(self, id_: int, reason: str) -> None:
        """Keep a request, but don't offer it to be drained any more."""
        changed = self._connection.execute("UPDATE requests SET set_aside = ? WHERE id = ?", (reason, id_))
        self._figures["set_aside"] += changed.rowcount  # none if it was replaced meanwhile

    def remove(self, ids: Collection[int]) -> None:
        """Forget requests."""
        self._figures.subtract(self._sums(f"id IN ({_listed(ids)})"))
        self._connection.execute(f"DELETE FROM requests WHERE id IN ({_listed(ids)})")

    def shrink(self) -> bool:
        """Give some of the disk space of an emptied file back; tell whether there was any."""
        page = self._figure("PRAGMA page_size") or 1
        free = (self._figure("PRAGMA freelist_count") or 0) * page
        if self._figures["requests"] != self._figures["set_aside"] or free <= _SHRINK_ABOVE:
            return False
        # By `executescript`, which runs it to its end; `execute` would leave it after one page.
        self._connection.executescript(
            f"PRAGMA incremental_vacuum({_SHRINK_ABOVE // page}); PRAGMA wal_checkpoint(TRUNCATE);"
        )
        return True

    def _prepare(self) -> None:
        version = self._figure("PRAGMA user_version")
        if version == _VERSION:
            return
        if self._figure("SELECT count(*) FROM sqlite_master"):
            raise sqlite3.DatabaseError(f"its schema is version {version}, not {_VERSION}")
        self._connection.executescript(_SCHEMA)

    def _check(self) -> None:
        [(verdict,)] = self._connection.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok" or (self._figure("SELECT max(id) FROM requests") or 0) > _LARGEST_ID:
            raise sqlite3.DatabaseError(verdict)

    def _figure(self, query: str, *parameters: str) -> int | None:
        [(figure,)] = self._connection.execute(query, parameters).fetchall()
        return None if figure is None else int(figure)

    def _sums(self, condition: str) -> dict[str, int]:
        [sums] = self._connection.execute(
            "SELECT count(*), coalesce(sum(item_count), 0), count(set_aside), coalesce(sum(length(otlp)), 0)"
            f" FROM requests WHERE {condition}"
        ).fetchall()
        return _figures(*sums)


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what no other file has for as long as this one is open; None when there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
    connection.text_factory = lambda data: data.decode(errors="replace")  # damage may be anywhere
    return connection


def _figures(requests: int, items: int, set_aside: int, size: int) -> dict[str, int]:
    return {"requests": requests, "items": items, "set_aside": set_aside, "bytes": size + requests * _OVERHEAD}


def read_damaged(path: Path) -> Iterator[StoredRecord]:
    """Read what can still be read of a damaged file: up to the damage, from either side."""
    seen: set[int] = set()
    with closing(_connected(path)) as connection:
        # No shared memory, as above; and the second makes SQLite read a file that is shorter than it says.
        connection.executescript("PRAGMA locking_mode = EXCLUSIVE; PRAGMA writable_schema = ON;")
        for order in ("ASC", "DESC"):
            try:
                for row in connection.execute(f"SELECT {_COLUMNS} FROM requests NOT INDEXED ORDER BY id {order}"):
                    if row[0] in seen:
                        return
                    seen.add(row[0])
                    yield _stored(row)
            except sqlite3.DatabaseError:
                continue
            return


def _take(rows: sqlite3.Cursor, *, max_items: int, max_bytes: int) -> list[StoredRecord]:
    found: list[StoredRecord] = []
    items = size = 0
    with closing(rows):
        for row in rows:
            stored = _stored(row)
            if stored.record is not None:
                items += stored.record.item_count
                size += stored.record.size
            if found and (items > max_items or size > max_bytes):
                break
            found.append(stored)
    return found


def _moment(in_doubt_since: object) -> int:
    """Return what the column may hold: damage may be anywhere."""
    return in_doubt_since if isinstance(in_doubt_since, int) else _NEVER


def _listed(ids: Iterable[int]) -> str:
    return ", ".join(map(str, ids))


def _stored(row: tuple[Any, ...]) -> StoredRecord:
    id_, signal, request_id, received_at, item_count, in_doubt_since, set_aside, checksum, otlp = row
    try:
        record = SpoolRecord(
            signal=Signal(signal),
            request_id=request_id,
            received_at=received_at,
            item_count=item_count,
            in_doubt=in_doubt_since != _NEVER,
            otlp=otlp,
        )
        intact = record.checksum == checksum and isinstance(in_doubt_since, int)
    except (TypeError, ValueError, struct.error):  # damage may be anywhere
        intact = False
    return StoredRecord(
        id=id_,
        record=record if intact else None,
        set_aside=set_aside,
        in_doubt_since=None if in_doubt_since == _NEVER else in_doubt_since,
    )
