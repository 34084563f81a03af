"""The order of prompts if targets are a guess: short prompts pass long ones as far as the long ones lose nothing by it.

Runs in the scheduler's process, and on the simulator's clock. First come, first served keeps the longest wait as short
as possible, but short prompts wait behind long ones. So each prompt gets a deadline from that order, the later of two
times:

- `_FIRST_COME_SHARE` of the time from its arrival to its end in that order;
- `_TAIL_SHARE` of the 90th percentile of that time over recent prompts.

The order that keeps all deadlines with the shortest mean wait is computed from its end (W. E. Smith, Naval Research
Logistics Quarterly 3, 1956). Several prompts may come last and keep their deadlines: the longest of them does. If no
prompt may, the one with the latest deadline comes last. The same choice is then made for the place before it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

_NUM_RECENT = 256
_TAIL = 0.9
_TAIL_SHARE = 0.75
"""Below 1, because the recent prompts may be of a busy time: one that comes later must not wait as long."""
_FIRST_COME_SHARE = 0.8
"""Below 1, because prompts that have passed others decode sooner, and make the steps of the others longer."""

_Item = TypeVar("_Item")


class PassingOrder(Generic[_Item]):
    """The order with the shortest mean wait in which no prompt misses its deadline, if there is one."""

    def __init__(self) -> None:
        self._deadlines: dict[_Item, float] = {}
        self._recent_s: deque[float] = deque(maxlen=_NUM_RECENT)  # times to the end, first come, first served

    def order(self, prompts: Sequence[tuple[_Item, float, float]], now: float) -> list[_Item]:
        """Put prompts in the order of computation.

        Args:
            prompts: all that are not computed, by arrival. Each has its arrival time, and the seconds that are left.
        """
        known, self._deadlines = self._deadlines, {}
        end = now
        for prompt, arrival_time, left_s in prompts:
            end += left_s
            self._deadlines[prompt] = known[prompt] if prompt in known else self._deadline(arrival_time, end)
        deadlines = [self._deadlines[prompt] for prompt, _, _ in prompts]
        by_deadline = sorted(range(len(prompts)), key=deadlines.__getitem__)
        may_be_last: list[tuple[float, int]] = []  # a heap, the longest first, of these the one that came last
        backwards: list[_Item] = []
        while len(backwards) < len(prompts):
            while by_deadline and (not may_be_last or deadlines[by_deadline[-1]] >= end):
                index = by_deadline.pop()
                heapq.heappush(may_be_last, (-prompts[index][2], -index))
            _, negative = heapq.heappop(may_be_last)
            prompt, _, left_s = prompts[-negative]
            end -= left_s
            backwards.append(prompt)
        return backwards[::-1]

    def _deadline(self, arrival_time: float, end: float) -> float:
        """Return the deadline of a prompt that first come, first served would end at ``end``."""
        self._recent_s.append(end - arrival_time)
        tail_s = sorted(self._recent_s)[int(_TAIL * len(self._recent_s))]
        return arrival_time + max(_FIRST_COME_SHARE * (end - arrival_time), _TAIL_SHARE * tail_s)
