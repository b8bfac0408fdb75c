"""A long run: `python -m tests.fuzz.run --seconds 600` fuzzes all targets side by side, a process each.

It begins with the corpus and what earlier runs found, and keeps that and the inputs that failed in `build/fuzz/`.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from tests.fuzz.checks import TARGETS
from tests.fuzz.make_corpus import CORPUS

_FOUND = Path("build/fuzz")
_MAX_BYTES = 16_384  # of an input: enough for every limit of depth and number that a decoder knows
_TIMEOUT = 20  # seconds that one input may take


def _command(target: str, seconds: int) -> list[str]:
    found = _FOUND / target
    found.mkdir(parents=True, exist_ok=True)
    options = {
        "max_total_time": seconds,
        "max_len": _MAX_BYTES,
        "timeout": _TIMEOUT,
        "artifact_prefix": f"{_FOUND}/{target}-",
        "print_final_stats": 1,
    }
    program = [sys.executable, "-m", "tests.fuzz.target", target]
    return [*program, str(found), str(CORPUS / target), *(f"-{name}={value}" for name, value in options.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the decoder.")
    parser.add_argument("--seconds", type=int, default=600, help="how long")
    seconds = parser.parse_args().seconds
    running = []
    for target in TARGETS:
        command = _command(target, seconds)
        log = _FOUND / f"{target}.log"
        sys.stdout.write(f"{log}: {shlex.join(command)}\n")
        sys.stdout.flush()
        with log.open("wb") as output:
            running.append((target, log, subprocess.Popen(command, stdout=output, stderr=output)))
    failed = [log for _, log, process in running if process.wait()]
    for target, log, _ in running:
        last = [line for line in log.read_text(errors="replace").splitlines() if " cov: " in line][-1:]
        sys.stdout.write(f"{target}: {'FAILED' if log in failed else 'nothing found'}; {''.join(last)}\n")
    if failed:
        sys.exit(f"see {', '.join(map(str, failed))}; the failing inputs lie beside them")


if __name__ == "__main__":
    main()
