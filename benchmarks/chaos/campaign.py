"""Cases of a seed: which are run, what they find, and the command that runs one of them again."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from hbserve.errors import HBServeError


class ChaosError(HBServeError):
    """Cases that ended otherwise than documented."""


class Campaign:
    """The cases of one kind, numbered from 0. A case's number and the seed determine everything that is random in it.

    Args:
        kind: name of the sub-command.
        first: number of the first case.
        count: maximum of cases.
        minutes: time after which no further case begins; default: no limit.

    Attributes:
        counts: what the cases have counted, by name.
        figures: what else they have found out; its values are JSON.
        failures: one line for each finding.
    """

    def __init__(self, kind: str, seed: int, first: int, count: int, minutes: float | None) -> None:
        self.kind, self.seed = kind, seed
        self._first, self._count = first, count
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.counts: Counter[str] = Counter()
        self.figures: dict[str, Any] = {}
        self.failures: list[str] = []

    def cases(self) -> Iterator[int]:
        """Yield the numbers of the cases until the count is reached or the time is over."""
        for number in range(self._first, self._first + self._count):
            if self._deadline is not None and time.monotonic() > self._deadline:
                return
            self.counts["cases"] += 1
            yield number

    def chance(self, number: int, purpose: str = "") -> random.Random:
        """Return the randomness of a case."""
        return random.Random(f"{self.kind} {self.seed} {number} {purpose}")

    def fail(self, number: int, what: str, detail: str = "", cases_before: int = 0) -> None:
        """Note a finding, and print it with the command that runs its case again.

        Args:
            detail: more lines, which are only printed.
            cases_before: number of earlier cases that may be the cause.
        """
        self.failures.append(f"case {number}: {what}")
        first = max(self._first, number - cases_before)
        again = (
            f"python -m benchmarks chaos {self.kind} --seed {self.seed} --first {first} --count {number + 1 - first}"
        )
        print(f"FAILED: case {number}: {what}\n{detail}  again: {again}", flush=True)

    def result(self) -> dict[str, Any]:
        """Return everything that is known so far."""
        return {"seed": self.seed, "first": self._first, **self.counts, **self.figures, "failures": self.failures}
