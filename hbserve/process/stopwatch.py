"""Where the time of something that happens in parts has gone."""

from __future__ import annotations

import time


class Stopwatch:
    """Runs from the start; every moment belongs to the part that ends next, so the parts sum to the whole.

    Attributes:
        parts: name -> seconds, in the order of their ends.
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, part: str) -> None:
        """A part ends here; one that has several pieces is their sum."""
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now
