"""What tests of the spool share: requests that are told apart by a number, and disks that are small."""

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from otel_pg_exporter.model import Signal
from otel_pg_exporter.pipeline.spool import FILE_NAME, Spool
from otel_pg_exporter.pipeline.spool_file import SpoolRecord

MAX_BYTES = 2**30


def made(number: int, *, size: int = 100, signal: Signal = Signal.TRACES, in_doubt: bool = False) -> SpoolRecord:
    """Return the request with this number, always the same; a larger number was received later."""
    return SpoolRecord(
        signal=signal,
        request_id=number.to_bytes(16, "big"),
        received_at=1_000 + number,
        item_count=1 + number % 7,
        in_doubt=in_doubt,
        otlp=random.Random(number).randbytes(size),
    )


def numbers(spool: Spool) -> list[int]:
    """Return the numbers of all intact requests, each of which must be as it was made."""
    found, last = [], 0
    while stored := spool.following(last):
        last = stored[-1].id
        for each in stored:
            if each.record is not None:
                number = int.from_bytes(each.record.request_id, "big")
                assert each.record.otlp == made(number, size=len(each.record.otlp)).otlp
                assert (each.record.received_at, each.record.item_count) == (1_000 + number, 1 + number % 7)
                found.append(number)
    return found


def to_drain(spool: Spool, signal: Signal = Signal.TRACES) -> list[int]:
    """Return the ids of what would be drained next, oldest first."""
    return [each.id for each in spool.oldest(signal, max_items=10**9, max_bytes=2**40)]


def corrupt_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(f"{FILE_NAME}.corrupt-*"))


@contextlib.contextmanager
def opened(folder: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[Spool]:
    spool = Spool(folder, max_bytes=max_bytes)
    try:
        yield spool
    finally:
        spool.close()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of this many bytes on the folder, where that is permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small tmpfs is not permitted here")
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def damage(path: Path, harm: Callable[[bytearray], None]) -> None:
    """Change a file's bytes in place, so that whoever has it open sees it."""
    data = bytearray(path.read_bytes())
    harm(data)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
