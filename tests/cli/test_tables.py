"""How tables are laid out on a terminal."""

import os
import pty
import subprocess
import sys

SCRIPT = """
from otel_pg_exporter.cli.output import table
print(*table(("part", "a number"), [("spans", "123,456,789,012")], right=("a number",)), sep="\\n")
print(*table(("part", "reason"), [("spans", "words that go on and on")]), sep="\\n")
"""


def test_words_are_cut_to_the_terminals_width_and_numbers_are_not() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", SCRIPT], stdout=theirs, env={**os.environ, "COLUMNS": "16"}, check=True)
    os.close(theirs)
    printed = os.read(ours, 4096).decode()
    os.close(ours)
    assert "spans  123,456,789,012\r\n" in printed
    assert "spans  words th…\r\n" in printed
