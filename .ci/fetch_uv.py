"""Fetch uv with nothing but the standard library, for a Python that has neither venv nor pip.

Usage: fetch_uv.py VERSION FOLDER. PIP_INDEX_URL names another index than PyPI. The wheel's SHA-256 is checked against
the index.
"""  # noqa: INP001 - a script, not part of a package

import hashlib
import json
import os
import platform
import sys
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

INDEX = "https://pypi.org/simple/"


def main(version: str, folder: Path) -> None:
    """Put `bin/uv` into the folder."""
    index = os.environ.get("PIP_INDEX_URL", INDEX).rstrip("/") + "/uv/"
    listing = json.loads(fetch(index, {"Accept": "application/vnd.pypi.simple.v1+json"}))
    wheel = next(entry for entry in listing["files"] if fits(entry["filename"], version))
    content = fetch(urllib.parse.urljoin(index, wheel["url"]), {})
    if hashlib.sha256(content).hexdigest() != wheel["hashes"]["sha256"]:
        raise SystemExit(f"{wheel['filename']} does not have the SHA-256 that the index promises")
    (folder / "bin").mkdir(parents=True)
    archive = folder / wheel["filename"]
    archive.write_bytes(content)
    with zipfile.ZipFile(archive) as opened:
        program = next(name for name in opened.namelist() if name.endswith(".data/scripts/uv"))
        (folder / "bin" / "uv").write_bytes(opened.read(program))
    (folder / "bin" / "uv").chmod(0o755)
    archive.unlink()


def fits(filename: str, version: str) -> bool:
    """Tell whether a wheel is the wanted one for this machine."""
    system = {"linux": "musllinux" if is_musl() else "manylinux", "darwin": "macosx"}[sys.platform]
    machine = {"aarch64": ("aarch64", "arm64"), "arm64": ("arm64",)}.get(platform.machine(), (platform.machine(),))
    return (
        filename.startswith(f"uv-{version}-")
        and f"-{system}_" in filename
        and filename.removesuffix(".whl").endswith(machine)
    )


def is_musl() -> bool:
    """Tell whether the C library is musl, as on Alpine."""
    return not platform.libc_ver()[0]


def fetch(url: str, headers: dict[str, str]) -> bytes:
    """Return what lies at an address."""
    if not url.startswith("https://"):
        raise SystemExit(f"refusing an index that is not https: {urllib.parse.urlsplit(url).hostname}")
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=120) as answer:  # noqa: S310 - https, as checked
        return bytes(answer.read())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
