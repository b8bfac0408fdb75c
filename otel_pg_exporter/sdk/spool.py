"""The exporters' spool: opened for each use, closed after it, and emptied by whoever comes by.

An exporter has no thread that could hold a spool open, and its process may fork at any time. So every use takes a
folder that nobody uses, or makes one, and leaves it behind: the next use, another process with the same settings, or
a receiver finds it there.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from otel_pg_exporter.config import DatabaseSettings, ExporterSpoolSettings
from otel_pg_exporter.errors import ConfigurationError, StartupError
from otel_pg_exporter.model import RowBatch, Signal
from otel_pg_exporter.pipeline.availability import Availability, Write
from otel_pg_exporter.pipeline.spool import FILE_NAME, Spool
from otel_pg_exporter.pipeline.spool_file import SpoolRecord
from otel_pg_exporter.pipeline.spool_folder import SpoolFolders
from otel_pg_exporter.pipeline.spool_writer import SpoolWriter
from otel_pg_exporter.postgres.dsn import target_of
from otel_pg_exporter.telemetry import ItemCounters
from otel_pg_exporter.transcode import Plan

# Held during each use, and by whoever forks: SQLite's connections must not be carried across a fork, and a folder's
# lock would not be free before the child's end.
_using = threading.RLock()
os.register_at_fork(before=_using.acquire, after_in_parent=_using.release, after_in_child=_using.release)


class ExporterSpool:
    """One exporter's view of the spools of its PostgreSQL. `_using` guards everything."""

    def __init__(self, root: Path, settings: ExporterSpoolSettings, database: DatabaseSettings, signal: Signal) -> None:
        """Try whether the folder can be used. Raises ConfigurationError."""
        self._root = root
        self._settings = settings
        self._target = target_of(database)
        self._signal = signal
        try:
            with _using:
                folders = self._folders()
                folders.acquire().release()
        except StartupError as exc:
            raise ConfigurationError(f"spool_dir: {exc}") from exc
        self._path = folders.path

    def start_afresh(
        self,
        plan: Plan,
        write: Write,
        *,
        probe: Callable[[], None],
        counters: ItemCounters,
        availability: Availability,
    ) -> None:
        """Begin with nothing counted; touches no file. For the arguments see SpoolWriter."""
        self._counters = counters
        self._left: dict[Path, int] = {}  # folder to how many items of the signal were left in it
        self._drained: dict[Path, int] = {}  # folder in which nothing can be written to when its file was last changed
        self._due = 0.0  # when the next attempt to drain makes sense, by time.monotonic
        self._writer = SpoolWriter(
            {self._signal: plan},
            write,
            probe=probe,
            counters=counters,
            availability=availability,
            ledger_ttl=self._settings.ledger_ttl,
        )

    def append(self, batch: RowBatch, otlp: bytes, *, in_doubt: bool) -> None:
        """Put a request on disk, and count its items as `in_spool` instead of `in_flight`.

        Raises OverloadedError or StartupError when the disk does not take it.
        """
        count = batch.item_count
        record = SpoolRecord.of(batch, otlp, in_doubt=in_doubt)
        with _using, contextlib.ExitStack() as stack:
            folder = self._folders().acquire()
            stack.callback(folder.release)
            stack.enter_context(self._opened(folder.path)).append(record)
            self._counters.add(self._signal, in_flight=-count, in_spool=count, spooled=count)

    def drain(self, until: float, *, insist: bool) -> None:
        """Write what any process has left, oldest first; begin no transaction after `until`, by time.monotonic.

        Unless it is to `insist`, it leaves a pause after a failure.
        Does nothing while another thread uses a spool. Raises OverloadedError, StartupError or OSError.
        """
        if (time.monotonic() < self._due and not insist) or not _using.acquire(blocking=False):
            return
        try:
            self._forget_taken()
            if not any(map(self._has_work, self._path.iterdir())):  # nearly always
                return
            for folder in self._folders().of_dead_processes():
                try:
                    if self._has_work(folder.path) and not self._drain(folder.path, until):
                        break
                finally:
                    folder.release()
        finally:
            _using.release()

    def _drain(self, folder: Path, until: float) -> bool:
        """Write what is in one folder, and say whether that was all."""
        pause: float | None = 0.0
        with self._opened(folder) as spool:
            while pause == 0.0 and time.monotonic() < until:
                pause = self._writer.advance(spool, self._signal)
        if pause is not None:
            self._due = time.monotonic() + pause
        elif (file := folder / FILE_NAME).exists():
            self._drained[folder] = file.stat().st_mtime_ns
        return pause is None

    def _folders(self) -> SpoolFolders:
        return SpoolFolders(self._root, self._target)

    @contextlib.contextmanager
    def _opened(self, folder: Path) -> Iterator[Spool]:
        """Open a locked folder's spool for one use, and count what other processes have done to it since the last."""
        with contextlib.closing(Spool(folder, max_bytes=self._settings.spool_max_bytes)) as spool:
            self._count_change(spool.items(self._signal) - self._left.pop(folder, 0))
            try:
                yield spool
            finally:
                self._left[folder] = spool.items(self._signal)

    def _count_change(self, items: int) -> None:
        if items > 0:
            self._counters.add(self._signal, recovered_from_spool=items, in_spool=items)
        elif items < 0:
            self._counters.add(self._signal, handed_over=-items, in_spool=items)

    def _forget_taken(self) -> None:
        """Count what was in files that other processes have emptied."""
        for folder in [folder for folder in self._left if not (folder / FILE_NAME).exists()]:
            self._count_change(-self._left.pop(folder))
            self._drained.pop(folder, None)

    def _has_work(self, folder: Path) -> bool:
        file = folder / FILE_NAME
        if not file.exists():
            return False
        # A process that was killed leaves its last requests in SQLite's log, and the file as it was.
        log = file.with_name(f"{FILE_NAME}-wal")
        return log.exists() or file.stat().st_mtime_ns != self._drained.get(folder)
