"""When `make` sets up anew; it is only asked what it would do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder that was set up by `make`, without Rust."""
    for name in ("Makefile", "pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    for stamp in (".rust", ".run", ".dev"):
        (tmp_path / ".venv" / stamp).write_text("\n")
    return tmp_path


def planned(clone: Path, *, cargo: str) -> str:
    """Return what `make run` would do beside a cargo that does this."""
    program = clone / "bin" / "cargo"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{cargo}\n")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "--dry-run", "--no-print-directory", "run"]
    return subprocess.run(command, cwd=clone, env={"PATH": path}, check=True, capture_output=True, text=True).stdout


def test_rust_that_comes_later_builds_the_core_that_was_left_out_and_only_once(clone: Path) -> None:
    assert "sync" not in planned(clone, cargo="exit 1")
    assert "--reinstall-package otel-pg-exporter" in planned(clone, cargo="echo cargo 1.85.0")
    (clone / ".venv" / ".rust").write_text("cargo 1.85.0\n")
    assert "sync" not in planned(clone, cargo="echo cargo 1.85.0")
    assert "--reinstall-package otel-pg-exporter" in planned(clone, cargo="echo cargo 1.90.0")
    assert "sync" not in planned(clone, cargo="exit 1")
