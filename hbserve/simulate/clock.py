"""The simulated clock: events in order of time, and work that goes on at a changing speed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable


class Event:
    """An action at a time, unless it is cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Drop the action."""
        self.action = None


class SimulatedClock:
    """A clock that jumps from event to event. Calling it returns the time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    def at(self, time: float, action: Callable[[], None]) -> Event:
        """Call ``action`` at a time, now at the earliest. Actions of equal times run in the order of these calls."""
        event = Event(action)
        self._count += 1
        heapq.heappush(self._events, (max(time, self.now), self._count, event))
        return event

    def advance(self) -> None:
        """Go to the next event and run it."""
        self.now, _, event = heapq.heappop(self._events)
        if event.action is not None:
            event.action()

    def run(self, until: float = math.inf) -> None:
        """Run all events up to a time, also those that other events add."""
        while self._events and self._events[0][0] <= until:
            self.advance()
        if until != math.inf:
            self.now = max(self.now, until)


class Progress:
    """Work whose speed may change, and the event of its end.

    Args:
        seconds: time that the work takes at speed 1.
        on_done: called at its end.

    Attributes:
        started: when it began.
    """

    __slots__ = ("_clock", "_event", "_left_s", "_on_done", "_since", "_speed", "started")

    def __init__(self, clock: SimulatedClock, seconds: float, on_done: Callable[[], None]) -> None:
        self._clock, self._on_done = clock, on_done
        self._left_s = seconds
        self._speed = 1.0
        self._since = self.started = clock.now
        self._event = clock.at(clock.now + seconds, on_done)

    def set_speed(self, speed: float) -> None:
        """Set how many seconds of work a second does from now on."""
        if speed != self._speed:
            now = self._clock.now
            self._left_s = max(0.0, self._left_s - (now - self._since) * self._speed)
            self._since, self._speed = now, speed
            self._event.cancel()
            self._event = self._clock.at(now + self._left_s / speed, self._on_done)
