"""What is shipped: the sdist, the wheel that is built from it, and that wheel in an environment of its own.

These tests fetch setuptools from the package index, and compile; `make test-packaging` runs them.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from otel_pg_exporter.transcode import CORE

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "dist", "target", "*.egg-info", "*.so", "__pycache__")

# Run by the Python of a fresh environment: what does the installed package find?
INSTALLED = """
import importlib.metadata, importlib.resources, json, otel_pg_exporter
from otel_pg_exporter import mapping
from otel_pg_exporter.transcode import CORE
package = importlib.resources.files("otel_pg_exporter")
distribution = importlib.metadata.distribution("otel-pg-exporter")
print(json.dumps({
    "where": str(package),
    "sql": sorted(entry.name for entry in (package / "migrations").iterdir() if entry.name.endswith(".sql")),
    "columns": [column.name for column in mapping.load().spans.columns],
    "core": CORE,
    "entry points": sorted((entry.group, entry.name) for entry in distribution.entry_points),
    "loads": all(entry.load() for entry in distribution.entry_points),
}))
"""


def uv(*arguments: str | Path, **environment: str) -> None:
    program = subprocess.check_output([ROOT / ".ci" / "uv"], text=True).strip()
    subprocess.run([program, *arguments], check=True, env={**os.environ, "UV_PYTHON_DOWNLOADS": "never", **environment})


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return the folder with the sdist and the wheel, built once for all workers, from a copy of the tree."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    folder = shared / "dist"
    with (shared / "dist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            source = shared / "source"
            shutil.copytree(ROOT, source, ignore=NOT_SOURCES)
            crates = str(ROOT / "native" / "target")  # where cargo has built them already
            options = ("--quiet", "--python", sys.executable, "--out-dir", shared / "dist.new")
            uv("build", *options, source, CARGO_TARGET_DIR=crates)
            (shared / "dist.new").rename(folder)
    return folder


@pytest.mark.packaging
def test_the_sdist_holds_what_a_packager_needs(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert shipped_files() <= {name.removeprefix("otel_pg_exporter/") for name in names}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "native").glob("src/**/*.rs")}
    assert {"native/Cargo.toml", "native/Cargo.lock", *sources} <= names
    assert not [name for name in names if "/target/" in name or name.endswith(".so")]


@pytest.mark.packaging
def test_the_wheel_that_is_built_from_the_sdist_holds_every_migration_and_mapping(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {f"otel_pg_exporter/{name}" for name in shipped_files()} <= names
    assert "otel_pg_exporter/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "otel_pg_exporter").rglob("*.py")}
    assert modules <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"otel_pg_exporter"}
    assert [name for name in names if name.endswith(".so")] == [
        "otel_pg_exporter/_native.abi3.so" for _ in [CORE] if CORE == "native"
    ]


def installed(wheel: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Install a wheel in an environment of its own; return its programs and what the package finds."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    uv("pip", "install", "--quiet", "--no-deps", "--python", python, wheel)
    # The dependencies are those of this environment; its own editable otel_pg_exporter is not found that way.
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin", json.loads(subprocess.check_output([python, "-c", INSTALLED], cwd="/"))


@pytest.mark.packaging
def test_the_wheel_works_in_an_environment_of_its_own(dist: Path, tmp_path: Path) -> None:
    programs, found = installed(next(dist.glob("*.whl")), tmp_path / "venv")

    assert found["where"].startswith(str(tmp_path))
    assert found["sql"] == sorted(path.name for path in (ROOT / "migrations").glob("*.sql"))
    assert {"trace_id", "span_id", "attributes", "gen_ai_request_model"} <= set(found["columns"])
    assert found["entry points"] == [
        ["console_scripts", "otel-pg-exporter"],
        ["opentelemetry_logs_exporter", "postgresql"],
        ["opentelemetry_traces_exporter", "postgresql"],
    ]
    assert found["loads"]
    assert found["core"] == CORE
    help_text = subprocess.check_output([programs / "otel-pg-exporter", "--help"], cwd="/", text=True)
    assert "serve" in help_text


@pytest.mark.packaging
@pytest.mark.parametrize("missing", ["Rust", "crates"])
def test_without_rust_or_its_crates_the_installation_works_and_the_reference_serves(
    dist: Path, tmp_path: Path, missing: str
) -> None:
    if missing == "Rust":
        folders = os.environ["PATH"].split(os.pathsep)
        lacking = {"PATH": os.pathsep.join(each for each in folders if not (Path(each) / "rustc").exists())}
    elif shutil.which("cargo") is None:
        pytest.skip("without Rust there is no use for crates")
    else:
        lacking = {"CARGO_HOME": str(tmp_path / "cargo"), "CARGO_NET_OFFLINE": "true"}
        lacking["RUSTUP_HOME"] = os.environ.get("RUSTUP_HOME", str(Path.home() / ".rustup"))
    sdist = next(dist.glob("*.tar.gz"))
    uv("build", "--quiet", "--wheel", "--python", sys.executable, "--out-dir", tmp_path / "dist", sdist, **lacking)
    programs, found = installed(next((tmp_path / "dist").glob("*.whl")), tmp_path / "venv")

    assert found["core"] == "Python reference"
    program = programs / "otel-pg-exporter"
    assert "(transcoder: Python reference)" in subprocess.check_output([program, "--version"], cwd="/", text=True)
    forced = subprocess.run(
        [program, "--version"],
        cwd="/",
        env={**os.environ, "OTEL_PG_EXPORTER_CORE": "native"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert forced.returncode == 2
    assert "OTEL_PG_EXPORTER_CORE is native, but this installation has no native core" in forced.stderr


def test_the_lock_file_fits_the_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locked = tomllib.loads((ROOT / "uv.lock").read_text())
    ours = next(package for package in locked["package"] if package["name"] == project["project"]["name"])
    extras = project["project"]["optional-dependencies"]
    declared = [*project["project"]["dependencies"], *(each for extra in extras.values() for each in extra)]
    assert sorted(map(requirement, ours["metadata"]["requires-dist"])) == sorted(declared)
    groups = ours["metadata"]["requires-dev"]
    # uv spells markers in a way of its own.
    unmarked = [declaration.partition(";")[0] for declaration in project["dependency-groups"]["dev"]]
    assert sorted(map(requirement, groups["dev"])) == sorted(unmarked)


def shipped_files() -> set[str]:
    """Return the data files that must be in every distribution."""
    found = [*(ROOT / "migrations").rglob("*.sql"), *(ROOT / "proto_mappings").rglob("*.toml")]
    assert len(found) >= 5
    return {str(path.relative_to(ROOT)) for path in found}


def requirement(entry: dict[str, object]) -> str:
    """Write an entry of the lock file as pyproject.toml does."""
    extras = entry.get("extras")
    brackets = f"[{','.join(map(str, extras))}]" if isinstance(extras, list) else ""
    return f"{entry['name']}{brackets}{entry.get('specifier', '')}"
