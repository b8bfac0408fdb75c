"""The corpus: what broke a decoder once, or might break the next."""

import pytest

from tests.fuzz.checks import TARGETS
from tests.fuzz.make_corpus import CORPUS, seeds

_LARGEST = 300_000  # bytes of the whole corpus: it lives in the repository


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_of_the_corpus_passes(target: str) -> None:
    for file in sorted((CORPUS / target).iterdir()):
        try:
            TARGETS[target](file.read_bytes())
        except Exception as exc:
            exc.add_note(str(file))
            raise


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_are_what_their_script_makes(target: str) -> None:
    assert {name: (CORPUS / target / name).read_bytes() for name, _ in seeds(target)} == dict(seeds(target))


def test_the_corpus_stays_small() -> None:
    assert sum(file.stat().st_size for file in CORPUS.glob("*/*")) < _LARGEST
