"""One target under atheris: `python -m tests.fuzz.target NAME [libFuzzer's options] [folders]`."""

import importlib
import random
import shlex
import sys
from typing import Any

atheris: Any = importlib.import_module("atheris")  # it has no types

with atheris.instrument_imports(include=["otel_pg_exporter"]):
    from tests.fuzz.checks import TARGETS
    from tests.fuzz.mutations import mutate

_OWN_MUTATIONS = 0.6  # the share that knows messages; the others are libFuzzer's, which copy what the code compares


def _mutate(data: bytes, max_size: int, seed: int) -> bytes:
    chance = random.Random(seed)
    if chance.random() < _OWN_MUTATIONS:
        mutated = mutate(bytes(data), chance, chance.randrange(1, 4))
        if len(mutated) <= max_size:
            return mutated
    return bytes(atheris.Mutate(data, max_size))


def main() -> None:
    _, target, *options = sys.argv
    check = TARGETS[target]
    # As a line for the shell: to merge folders and to make a crash smaller, libFuzzer runs its first argument again.
    program = shlex.join([sys.executable, "-m", "tests.fuzz.target", target])
    atheris.Setup([program, *options], lambda data: check(bytes(data)), custom_mutator=_mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
