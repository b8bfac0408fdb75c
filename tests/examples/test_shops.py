"""The shop in other languages than Python, by the commands of its README."""

import functools
import re

import pytest

from tests.examples.quickstart import EXAMPLES, assert_a_query_finds, assert_the_shop_is_told, fetch, run, variables
from tests.serving import Serving

pytestmark = [pytest.mark.toolchain, pytest.mark.timeout(900)]

PROTOCOLS = {
    "node": ("grpc", "http/protobuf"),
    "go": ("grpc", "http/protobuf"),
    "java": ("grpc", "http/protobuf"),
}
SDKS = {"node": "nodejs", "go": "go", "java": "java"}  # as they name themselves


def fenced(language: str, kind: str) -> str:
    """Return the README's only block of a kind."""
    readme = (EXAMPLES / language / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    return str(block)


@functools.cache
def prepared(language: str) -> list[str]:
    """Run the README's command that fetches all that is needed; return the one that runs the shop."""
    commands = [line.split() for line in fenced(language, "sh").splitlines() if not line.startswith("export ")]
    prepare, start = commands
    fetch(EXAMPLES / language, *prepare)
    return start


@pytest.mark.parametrize(
    ("language", "protocol"),
    [
        pytest.param(language, protocol, marks=pytest.mark.quickstart(language=language))
        for language, protocols in PROTOCOLS.items()
        for protocol in protocols
    ],
)
def test_the_shop_arrives_and_its_readme_shows_what_is_found(
    language: str, protocol: str, serving: Serving, dsn: str
) -> None:
    run(EXAMPLES / language, *prepared(language), variables=variables(serving, f"shop-{language}", protocol))
    assert_the_shop_is_told(dsn, f"shop-{language}", SDKS[language])
    assert_a_query_finds(dsn, fenced(language, "sql"), fenced(language, "text"))
