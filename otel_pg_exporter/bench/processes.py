"""What processes have computed, by the system's accounts. Linux."""

import contextlib
import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")  # a second


def cpu_seconds(pid: int, *, with_children: bool = False) -> float:
    """Return the CPU time of a process, on request with that of its children, dead or alive; raise OSError without."""
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
