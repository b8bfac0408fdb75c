"""The corpus: what broke a decoder once, or might break the next."""

from pathlib import Path

import pytest

from tests.fuzz.checks import TARGETS
from tests.fuzz.make_corpus import CORPUS, seeds

_LARGEST = 300_000  # bytes of the whole corpus: it lives in the repository


_INPUTS = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("file", _INPUTS, ids=[f"{file.parent.name}-{file.name}" for file in _INPUTS])
def test_every_input_of_the_corpus_passes(file: Path) -> None:
    TARGETS[file.parent.name](file.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_are_what_their_script_makes(target: str) -> None:
    assert {name: (CORPUS / target / name).read_bytes() for name, _ in seeds(target)} == dict(seeds(target))


def test_the_corpus_stays_small() -> None:
    assert sum(file.stat().st_size for file in _INPUTS) < _LARGEST
