"""The shop in other languages than Python, by the commands of its README."""

import functools
import re

import pytest

from tests.examples.quickstart import EXAMPLES, assert_the_shop_is_told, fetch, run, variables
from tests.serving import Serving

pytestmark = [pytest.mark.toolchain, pytest.mark.timeout(900)]

LANGUAGES = {"node": "nodejs", "go": "go", "java": "java"}  # folder: as SDKs name themselves


@functools.cache
def commands(language: str) -> list[list[str]]:
    """Return the README's commands without the variables: what fetches all that is needed, and what runs the shop."""
    readme = (EXAMPLES / language / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    return [line.split() for line in block.splitlines() if not line.startswith("export ")]


@pytest.mark.parametrize(
    "language", [pytest.param(each, marks=pytest.mark.quickstart(language=each)) for each in LANGUAGES]
)
def test_the_shop_arrives_with_its_logs_and_its_failure(language: str, serving: Serving, dsn: str) -> None:
    prepare, start = commands(language)
    fetch(EXAMPLES / language, *prepare)
    run(EXAMPLES / language, *start, variables=variables(f"http://{serving.address}", f"shop-{language}"))
    assert_the_shop_is_told(dsn, f"shop-{language}", LANGUAGES[language])
