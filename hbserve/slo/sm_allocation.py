"""How prefill and decode share a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from hbserve.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class SMAllocation:
    """Percentages of the streaming multiprocessors (of the threads, on a CPU) while both phases run.

    The sum may pass 100: the phases then compete, and prefill, which has the lower priority, yields.

    Attributes:
        mixed: both phases are done by one worker, in the same steps. The percentages are then those
            that workers of one phase are kept ready at.

    Raises:
        ConfigError: if a percentage is no whole number from 1 to 100.
    """

    prefill_percentage: int
    decode_percentage: int
    mixed: bool = False

    def __post_init__(self) -> None:
        for name in ("prefill_percentage", "decode_percentage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
                raise ConfigError(f"{name}: must be a whole number from 1 to 100, got {value!r}", name)

    def __str__(self) -> str:
        return f"({self.prefill_percentage}, {self.decode_percentage})" + " mixed" * self.mixed
