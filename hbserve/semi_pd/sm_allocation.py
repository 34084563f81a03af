"""How a device is divided."""

from __future__ import annotations

from dataclasses import dataclass

from hbserve.config import InstanceRole


@dataclass(frozen=True)
class SMAllocation:
    """Each phase's percentage of the device's multiprocessors while both are busy.

    The sum may pass 100: both then compete for the rest, prefill at a lower priority.

    Raises:
        ValueError: if one is not in 1..100.
    """

    prefill_percentage: int
    decode_percentage: int

    def __post_init__(self) -> None:
        for name in ("prefill_percentage", "decode_percentage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
                raise ValueError(f"{name} must be a whole number in 1..100, got {value!r}")

    def of(self, phase: InstanceRole) -> int:
        """The percentage of ``prefill`` or ``decode``."""
        return self.prefill_percentage if phase is InstanceRole.PREFILL else self.decode_percentage

    def as_dict(self) -> dict[str, int]:
        """For status reports."""
        return {"prefill_percentage": self.prefill_percentage, "decode_percentage": self.decode_percentage}
