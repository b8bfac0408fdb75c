"""A short run of each target under atheris, in a process of its own."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.checks import TARGETS
from tests.fuzz.make_corpus import CORPUS

_MISSING = importlib.util.find_spec("atheris") is None
_SECONDS = 1  # a target; `make fuzz` runs long


@pytest.mark.skipif(_MISSING, reason="atheris has no wheel for this Python or system")
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run_from_the_corpus_finds_nothing(target: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(CORPUS / target, corpus)
    command = [sys.executable, "-m", "tests.fuzz.target", target, str(corpus)]
    options = [f"-max_total_time={_SECONDS}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)

    found = {file.name: file.read_bytes().hex() for file in tmp_path.iterdir() if file.is_file()}
    assert (done.returncode, found) == (0, {}), done.stdout + done.stderr
    assert "Done " in done.stderr
