"""Shares of a device, as plain data: needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Partition:
    """The share of a device that one process gets.

    Attributes:
        percentage: of the device's multiprocessors, or of the instance's threads on CPU.
        end: which multiprocessors: processes at different ends have some in common only if their
            percentages add up to more than 100.
        priority: 0 is normal, 1 below it: work of the latter yields to work of the former.
    """

    percentage: int = 100
    end: Literal["first", "last"] = "first"
    priority: int = 0
