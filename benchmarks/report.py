"""Tables of figures, as plain text and as Markdown, and what they were measured on."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psycopg

_PREFACE = """\
# Results

Each part is of the last run of one script, written by it; how to read them: [README.md](README.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text; the first column names the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Tables that answer one question."""

    title: str
    text: str
    tables: Sequence[Table]


def facts(server_version: str, load_before: float) -> dict[str, str]:
    """Say what a run was made on; nothing that names a host or a folder."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "Date": f"{datetime.now(UTC):%Y-%m-%d}",
        "Machine": f"{_cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()}",
        "Load average": f"{load_before:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended",
        "PostgreSQL": server_version,
        "psycopg": f"{psycopg.__version__} ({psycopg.pq.__impl__})",
        "Python": platform.python_version(),
    }


def plain(facts_: dict[str, str], sections: Sequence[Section]) -> str:
    """Render for a terminal."""
    lines = [f"{name}: {value}" for name, value in facts_.items()]
    for section in sections:
        lines += ["", *([section.title, "=" * len(section.title)] if section.title else []), section.text]
        for table in section.tables:
            lines += ["", *aligned(table)]
    return "\n".join(lines) + "\n"


def markdown(facts_: dict[str, str], sections: Sequence[Section], *, title: str, command: str) -> str:
    """Render one script's part of the results."""
    lines = [f"## {title}", "", f"Written by `{command}`.", ""]
    lines += [f"* {name}: {value}" for name, value in facts_.items()]
    for section in sections:
        lines += ["", *([f"### {section.title}", ""] if section.title else []), section.text]
        for table in section.tables:
            lines += ["", _row(table.header), _row(["---", *["---:"] * (len(table.header) - 1)])]
            lines += [_row(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def publish(path: Path, title: str, part: str) -> None:
    """Put a script's part into the file of results, in place of what it wrote there before."""
    text = path.read_text() if path.exists() else _PREFACE
    preface, *parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = [each for each in parts if not each.startswith(f"## {title}\n")]
    place = len(kept) if len(kept) == len(parts) else [each.startswith(f"## {title}\n") for each in parts].index(True)
    kept.insert(place, part)
    path.write_text("\n".join(each.rstrip() + "\n" for each in (preface, *kept)))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def aligned(table: Table) -> list[str]:
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
