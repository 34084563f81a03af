"""How many tokens each expert has computed, read from the device now and then without waiting for it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

INTERVAL_S = 1.0


class ExpertLoads:
    """Reader of counters that the layers add to. It runs in the thread that launches steps.

    Args:
        totals: int64 ``[layers, experts]``, on the device; what it counts so far is left out.
    """

    def __init__(self, totals: Tensor) -> None:
        self._totals = totals
        self._reported = totals.to("cpu", copy=True)
        self._copy: Tensor | None = None
        self._copied: Any = None
        self._next_at = 0.0

    def poll(self) -> list[list[int]] | None:
        """Return the increase since the last report, if a copy has arrived; start a copy if one is due."""
        increase = None
        if self._copy is not None and (self._copied is None or self._copied.query()):
            increase = (self._copy - self._reported).tolist()
            self._reported, self._copy = self._copy, None
        now = time.monotonic()
        if self._copy is None and now >= self._next_at:
            self._next_at = now + INTERVAL_S
            self._copy = torch.empty_like(self._totals, device="cpu", pin_memory=self._totals.is_cuda)
            self._copy.copy_(self._totals, non_blocking=True)
            if self._totals.is_cuda:
                self._copied = torch.Event(self._totals.device)
                self._copied.record()
        return increase
