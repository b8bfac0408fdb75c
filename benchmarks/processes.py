"""Processes from outside: which cores they may use, and how much memory they hold.

Where there are four cores or more, the load generator has the last one to itself, in every run.
"""

import os
from pathlib import Path

_CORES = sorted(os.sched_getaffinity(0))
_ENOUGH_CORES = 4
GENERATOR_CORE = _CORES[-1] if len(_CORES) >= _ENOUGH_CORES else None


def pin() -> None:
    """Leave the generator's core to it: what is started from now on stays on the others."""
    if GENERATOR_CORE is not None:
        os.sched_setaffinity(0, set(_CORES) - {GENERATOR_CORE})


def split() -> str:
    """Say who may use which cores, for a report."""
    if GENERATOR_CORE is None:
        return f"{len(_CORES)} cores, which the load generator, the receiver and PostgreSQL share"
    return f"{len(_CORES)} cores: one for the load generator, {len(_CORES) - 1} for the receiver and PostgreSQL"


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
