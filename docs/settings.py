# ruff: noqa: INP001 - a script, not a package
"""Write the tables of settings in the documentation anew, from their definitions: `.venv/bin/python docs/settings.py`.

`tests/test_config.py` holds the tables equal to what this writes.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from otel_pg_exporter.config import (
    SDK_PREFIX,
    SERVER_PREFIX,
    ExporterSettings,
    ServeSettings,
    markdown_table,
)

DOCS = Path(__file__).parent

BEGIN = "<!-- settings: written by docs/settings.py -->\n"
END = "<!-- end of settings -->"


def tables() -> Iterator[tuple[Path, Iterable[str]]]:
    """Yield each document with the lines of its table."""
    server = {"flag": lambda setting: setting.flag, "key in the file": lambda setting: setting.name}
    yield DOCS / "settings.md", markdown_table(ServeSettings, prefix=SERVER_PREFIX, names=server)
    sdk = {"argument": lambda setting: setting.name}
    yield DOCS / "sdk.md", markdown_table(ExporterSettings, prefix=SDK_PREFIX, names=sdk)


def with_table(text: str, lines: Iterable[str]) -> str:
    """Return a document's text with its table replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + begin + "".join(f"{line}\n" for line in lines) + end + after


if __name__ == "__main__":
    for path, table in tables():
        path.write_text(with_table(path.read_text(encoding="utf-8"), table), encoding="utf-8")
