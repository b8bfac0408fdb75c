"""Processes from outside: which cores they may use, what they have computed, and how much memory they hold.

Where there are four cores or more, the load generator has the last one to itself, in every run.
"""

import contextlib
import os
from pathlib import Path

_CORES = sorted(os.sched_getaffinity(0))
_ENOUGH_CORES = 4
GENERATOR_CORE = _CORES[-1] if len(_CORES) >= _ENOUGH_CORES else None
_TICKS = os.sysconf("SC_CLK_TCK")


def pin() -> None:
    """Leave the generator's core to it: what is started from now on stays on the others."""
    if GENERATOR_CORE is not None:
        os.sched_setaffinity(0, set(_CORES) - {GENERATOR_CORE})


def split() -> str:
    """Say who may use which cores, for a report."""
    if GENERATOR_CORE is None:
        return f"{len(_CORES)} cores, which the load generator, the receiver and PostgreSQL share"
    return f"{len(_CORES)} cores: one for the load generator, {len(_CORES) - 1} for the receiver and PostgreSQL"


def cpu_seconds(pid: int, *, with_children: bool = False) -> float:
    """Return the CPU time of a process, on request with that of its children, dead or alive."""
    user, system, *of_dead_children = _account(pid)[11:15]
    total = user + system
    if with_children:
        total += sum(of_dead_children)
        for other in (each.name for each in Path("/proc").iterdir() if each.name.isdigit()):
            with contextlib.suppress(OSError):
                fields = _account(int(other))
                if fields[1] == pid:
                    total += sum(fields[11:15])
    return total / _TICKS


def _account(pid: int) -> list[int]:
    # All that stands behind the name: from the state, which is no number, on.
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [0, *map(int, words[1:])]


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
