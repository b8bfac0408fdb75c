# ruff: noqa: INP001 - a script, not a package
"""Lay out what the documentation's site is built from: `make docs`.

The site's pages link to files outside docs/, as they do on GitHub: the README, examples, results of benchmarks. So the
source of the site is a folder that looks like the repository, with a symbolic link for each file that can be reached
from the README and from docs/ by links. Relative links then work, and are checked, in both places.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def linked(document: Path) -> Iterator[Path]:
    """Yield the files of the repository that a Markdown document links to."""
    for target in _LINK.findall(document.read_text(encoding="utf-8")):
        path = Path(os.path.normpath(document.parent / target))
        if "://" not in target and path.is_file():
            yield path


def reachable() -> set[Path]:
    """Return the files of the site: the README, docs/, and whatever these link to, directly or not."""
    found: set[Path] = set()
    waiting = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(linked(path) if path.suffix == ".md" else ())
    return found


def lay_out(source: Path) -> None:
    """Make the folder `source` anew."""
    shutil.rmtree(source, ignore_errors=True)
    for path in reachable():
        link = source / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
