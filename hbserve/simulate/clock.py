"""Simulated time."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Event:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """It will not happen."""
        self.action = None


class SimulatedClock:
    """Runs events in order of time; calling it gives the time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    def at(self, time: float, action: Callable[[], None]) -> Event:
        """Call ``action`` at a time, now at the earliest; at equal times in the order of these calls."""
        event = Event(action)
        self._count += 1
        heapq.heappush(self._events, (max(time, self.now), self._count, event))
        return event

    def run(self, until: float = float("inf")) -> None:
        """Run all events up to a time, those that come of others included."""
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            if event.action is not None:
                event.action()
        if until != float("inf"):
            self.now = max(self.now, until)


class Progress:
    """Work that goes on at a speed that may change, and the event of its end.

    Args:
        seconds: that it takes at speed 1.
        done: called at its end.
    """

    def __init__(self, clock: SimulatedClock, seconds: float, done: Callable[[], None]) -> None:
        self._clock, self._done = clock, done
        self.total_s = seconds
        self._left_s = seconds
        self._speed = 1.0
        self._since = self.started = clock.now
        self._event = clock.at(clock.now + seconds, done)

    @property
    def done_s(self) -> float:
        """Seconds of work that have been done."""
        return self.total_s - self._left_s + (self._clock.now - self._since) * self._speed

    def set_speed(self, speed: float) -> None:
        """From now on so many seconds of work per second."""
        if speed != self._speed:
            self._settle()
            self._speed = speed
            self._reschedule()

    def shorten(self, total_s: float) -> None:
        """There is less to do than was said."""
        self._settle()
        self._left_s = max(0.0, self._left_s - (self.total_s - total_s))
        self.total_s = total_s
        self._reschedule()

    def _settle(self) -> None:
        self._left_s = max(0.0, self._left_s - (self._clock.now - self._since) * self._speed)
        self._since = self._clock.now

    def _reschedule(self) -> None:
        self._event.cancel()
        self._event = self._clock.at(self._clock.now + self._left_s / self._speed, self._done)
