"""The order of prompts if targets are a guess: few prompts wait long, and these are the long ones in a burst.

Runs in the scheduler's process, and on the simulator's clock. First come, first served keeps the longest wait as short
as possible, but short prompts wait behind long ones. Two rules depart from it.

*Passing.* Each prompt gets a deadline from the order of arrival, the later of two times:

- `_FIRST_COME_SHARE` of the time from its arrival to its end in that order;
- `_TAIL_SHARE` of the 90th percentile of that time over recent prompts.

The order that keeps all deadlines with the shortest mean wait is computed from its end (W. E. Smith, Naval Research
Logistics Quarterly 3, 1956). Several prompts may come last and keep their deadlines: the longest of them does. If no
prompt may, the one with the latest deadline comes last. The same choice is then made for the place before it.

*Standing back.* In a burst all prompts wait. If a few long ones let the others pass, all others have their first tokens
sooner. So if a prompt would wait nearly as long as the latest of the recent ones, the longest prompt up to it stands
back behind all that do not (Moore and Hodgson's rule, Management Science 15, 1968). `BACK_SHARE` of the prompts may do
so at most, and none for longer than `MAX_WAIT` of these times.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

_NUM_RECENT = 256
_TAIL = 0.9
_TAIL_SHARE = 0.75
"""Below 1, because the recent prompts may be of a busy time: one that comes later must not wait as long."""
_FIRST_COME_SHARE = 0.8
"""Below 1, because prompts that have passed others decode sooner, and make the steps of the others longer."""
BACK_SHARE = 0.007
"""Share of the prompts that may stand back: the 99th percentile is that of the others."""
_FIRST_BACK, _MAX_BACK = 0.5, 8.0
"""How many may stand back at once: at the start, and after a long time without a burst."""
_NUM_LATEST, _LATEST, _LATEST_SHARE = 512, 0.98, 0.8
"""A prompt may wait for this share of the 98th percentile of recent times before others stand back."""
_MIN_LATEST = 16
"""Recent prompts that must be known for that."""
_MIN_GAIN = 0.1
"""Share of a wait that a prompt must take to stand back for it."""
MAX_WAIT = 2.5
"""A prompt that stands back has its place by arrival again when it has waited for so many times what others may."""

_Item = TypeVar("_Item")
_Prompts = Sequence[tuple[_Item, float, float]]


class PassingOrder(Generic[_Item]):
    """An order with a short mean wait in which all but a few prompts keep their deadlines, if there is one."""

    def __init__(self) -> None:
        self._deadlines: dict[_Item, float] = {}
        self._recent_s: deque[float] = deque(maxlen=_NUM_LATEST)  # times to the end, first come, first served
        self._longest_wait_s = math.inf  # that makes others stand back
        self._back_until: dict[_Item, float] = {}  # prompts that stand back, or have done so
        self._may_stand_back = _FIRST_BACK  # so many more

    def order(self, prompts: _Prompts[_Item], now: float) -> list[_Item]:
        """Put prompts in the order of computation.

        Args:
            prompts: all that are not computed, by arrival. Each has its arrival time, and the seconds that are left.
        """
        known, self._deadlines = self._deadlines, {}
        self._note_new(prompts, known, now)
        self._stand_back(prompts, now)
        others = [item for item in prompts if self._back_until.get(item[0], now) <= now]
        deadlines, end = [], now
        for prompt, arrival_time, left_s in others:
            end += left_s
            self._deadlines[prompt] = known[prompt] if prompt in known else self._deadline(arrival_time, end)
            deadlines.append(min(self._deadlines[prompt], max(arrival_time + self._longest_wait_s, end)))
        back = [prompt for prompt, _, _ in prompts if self._back_until.get(prompt, now) > now]
        self._deadlines.update((prompt, known.get(prompt, now)) for prompt in back)
        return _shortest_mean_wait(others, deadlines, end) + back

    def _note_new(self, prompts: _Prompts[_Item], known: dict[_Item, float], now: float) -> None:
        end, num_recent = now, 0
        for prompt, arrival_time, left_s in prompts:
            end += left_s
            if prompt not in known:
                num_recent += 1
                self._recent_s.append(end - arrival_time)
        self._may_stand_back = min(self._may_stand_back + BACK_SHARE * num_recent, _MAX_BACK)
        if num_recent and len(self._recent_s) >= _MIN_LATEST:
            self._longest_wait_s = _LATEST_SHARE * _quantile(self._recent_s, _LATEST)

    def _stand_back(self, prompts: _Prompts[_Item], now: float) -> None:
        """Choose the prompts that stand back; none does so twice."""
        known, self._back_until = self._back_until, {}
        end = now
        chosen: list[tuple[float, int]] = []  # a heap, the longest first
        for index, (prompt, arrival_time, left_s) in enumerate(prompts):
            if prompt in known:
                self._back_until[prompt] = known[prompt]
                if known[prompt] > now:
                    continue
            else:
                heapq.heappush(chosen, (-left_s, -index))
            end += left_s
            wait_s = end - arrival_time
            if wait_s <= self._longest_wait_s or self._may_stand_back < 1 or not chosen:
                continue
            negative_s, negative = chosen[0]
            if -negative != index and -negative_s > _MIN_GAIN * wait_s:
                heapq.heappop(chosen)
                end += negative_s
                self._may_stand_back -= 1
                back, arrival_time, _ = prompts[-negative]
                self._back_until[back] = max(now, arrival_time + MAX_WAIT * self._longest_wait_s)

    def _deadline(self, arrival_time: float, end: float) -> float:
        """Return the deadline of a prompt that first come, first served would end at ``end``."""
        tail_s = _quantile(list(self._recent_s)[-_NUM_RECENT:], _TAIL)
        return arrival_time + max(_FIRST_COME_SHARE * (end - arrival_time), _TAIL_SHARE * tail_s)


def _shortest_mean_wait(prompts: _Prompts[_Item], deadlines: Sequence[float], end: float) -> list[_Item]:
    """Return the order that keeps all deadlines with the shortest mean wait; the last prompt ends at ``end``."""
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


def _quantile(times_s: Sequence[float], share: float) -> float:
    return sorted(times_s)[int(share * len(times_s))]
