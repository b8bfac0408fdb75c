"""What the documentation points to is there, and what is generated in it is as the code has it."""

import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from otel_pg_exporter.cli.main import whole_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
    if "node_modules" not in path.parts
)


def headings(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_every_test_that_is_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = document.parent / name if name else document
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target
    for named in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (ROOT / named).exists(), named


def commands(document: Path) -> list[str]:
    """Return how our program is called in a document's blocks for the shell, without its name."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ")
    return re.findall(r"(?:^|[ /])otel-pg-exporter ([a-z][^|;&>#\n]*)", lines, re.MULTILINE)


def test_every_command_that_is_shown_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [(document.name, command) for document in DOCUMENTS for command in commands(document)]
    assert len(shown) > 30
    for document, command in shown:
        try:
            whole_parser().parse_args(shlex.split(command))
        except SystemExit:
            pytest.fail(f"{document}: {command}: {capsys.readouterr().err}")


def test_what_is_generated_says_what_the_code_has() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for part in script["PARTS"]:
        text = part.document.read_text(encoding="utf-8")
        assert text == script["with_part"](text, part), "run `make docs-reference`"


def test_the_site_is_built_without_a_broken_link_and_its_navigation_has_every_page(tmp_path: Path) -> None:
    configuration = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    (tmp_path / "zensical.toml").write_text(configuration, encoding="utf-8")
    project = tomllib.loads(configuration)["project"]
    for command in (
        [sys.executable, str(ROOT / "docs" / "site.py"), str(tmp_path / project["docs_dir"])],
        [str(Path(sys.executable).with_name("zensical")), "build", "--strict"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    navigation = re.findall(r'= "(docs/[^"]+\.md)"', configuration)
    assert sorted(navigation) == sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
    assert (tmp_path / project["site_dir"] / "docs" / "index.html").exists()
