"""KV tiers of a user's own: one that is right, and one that is wrong in every way, by turns."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

import torch

from hbserve.kv_tiers.base import BlockName, KVTier, KVTierContext


class DictTier(KVTier):
    """Values in a dictionary of the process, which all objects share."""

    kept: ClassVar[dict[str, bytearray]] = {}
    removed: ClassVar[list[str]] = []
    num_gets: ClassVar[int] = 0

    def __init__(self, context: KVTierContext) -> None:
        self.context = context
        self.registered: list[torch.Tensor] = []

    def register(self, values: torch.Tensor) -> None:
        self.registered.append(values)

    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        for name, value in zip(names, values, strict=True):
            self.kept[name.text] = bytearray(value.numpy().tobytes())
        return {}

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        failures = {}
        DictTier.num_gets += 1
        for place, name in enumerate(names):
            if name.text in self.kept:
                values[place] = torch.frombuffer(self.kept[name.text], dtype=torch.uint8)
            else:
                failures[place] = "missing"
        return failures

    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        return [name.text in self.kept for name in names]

    def remove(self, names: Sequence[BlockName]) -> None:
        self.removed.extend(name.text for name in names)
        for name in names:
            self.kept.pop(name.text, None)


class WrongTier(DictTier):
    """Says that it has every block, and raises, hangs, or returns bytes of other blocks or none at all."""

    def __init__(self, context: KVTierContext) -> None:
        super().__init__(context)
        self._num_reads = self._num_lookups = 0

    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        raise LookupError("the wrong tier keeps nothing")

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        self._num_reads += 1
        if self._num_reads % 3 == 0:
            raise ZeroDivisionError("the wrong tier cannot read")
        if self._num_reads % 3 == 1:
            values.fill_(7)
        return {}

    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        self._num_lookups += 1
        if self._num_lookups == 2:
            threading.Event().wait(1.5)
        return [True] * len(names)
