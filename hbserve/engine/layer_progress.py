"""The progress of a step through its layers: which have stored their keys and values while others still compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LayerProgress:
    """A report for each of several equal groups of layers, when the group's keys and values are in the cache.

    Args:
        num_layers: of the model.
        num_groups: a divisor of ``num_layers``.
        on_stored: called with the number of each group, in order: on CPU by `stored`, on a GPU by `wait`. `finish`
            calls it for the groups that these two have not seen.
    """

    def __init__(
        self, num_layers: int, num_groups: int, device: torch.device, on_stored: Callable[[int], None]
    ) -> None:
        assert num_layers % num_groups == 0, f"{num_layers} layers are no {num_groups} equal groups"
        self._num_groups, self._layers_per_group = num_groups, num_layers // num_groups
        self._on_stored = on_stored
        self._is_cuda = device.type == "cuda"
        self._events: list[Any] = []
        self._num_reported = 0

    def stored(self, layer: int) -> None:
        """Note that a layer has stored, or on a GPU will have when the stream gets here; in the launching thread."""
        if (layer + 1) % self._layers_per_group:
            return
        if not self._is_cuda:
            self._report()
            return
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)

    def wait(self) -> None:
        """On a GPU, wait for one group after the other; blocks nearly as long as the step takes."""
        for event in self._events:
            event.synchronize()
            self._report()

    def finish(self) -> None:
        """Report the remaining groups: the step is done."""
        while self._num_reported < self._num_groups:
            self._report()

    def _report(self) -> None:
        self._num_reported += 1
        self._on_stored(self._num_reported - 1)
