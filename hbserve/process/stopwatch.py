"""Stopwatch for work that has parts."""

from __future__ import annotations

import time


class Stopwatch:
    """Stopwatch that runs from its construction; time belongs to the part that ends next, so parts sum to the whole.

    Attributes:
        parts: seconds by name, in the order of the parts' ends.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """End a part; a part with several pieces is their sum."""
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now
