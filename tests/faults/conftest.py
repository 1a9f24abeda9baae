"""How many faults are injected, which, and where it is written down that they were."""

import json
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pytest

from tinylm import files

One = TypeVar("One")


class Tally:
    """A sample of the faults in `make test`, all of them with --long; a row a test."""

    def __init__(self, place: str, seed: int):
        self.place, self.seed = place, seed
        self.rng = np.random.default_rng(seed)

    def many(self, sample: int, long: int) -> int:
        """Give how many trials to make."""
        return long if self.place else sample

    def chosen(self, faults: Sequence[One], share: int) -> list[One]:
        """Give every fault, or one of every `share` of them."""
        if self.place:
            return list(faults)
        return list(faults)[int(self.rng.integers(share))::share]

    def __call__(self, what: str, trials: int, found: str) -> None:
        """Write down what was tried and what came of it."""
        if self.place:
            row = {"faults": what, "trials": trials, "seed": self.seed, "found": found}
            files.append_lines(self.place, [json.dumps(row)])


@pytest.fixture
def tally(request) -> Tally:
    """Of one test; its seed is in the assertion of a failure."""
    place, seed = request.config.getoption("--long"), request.config.getoption("--draw")
    print(f"--draw {seed}")
    return Tally(place, seed)
