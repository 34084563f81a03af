"""Clients that ask all the time, and compare every answer with the right one."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from benchmarks.chaos.questions import Answer, Question, ask, new_session
from benchmarks.chaos.service import Service

NUM_CLIENTS = 6


class Load:
    """Clients that ask one question after the other, and compare each answer with the right one.

    Attributes:
        num_events: events of streams so far.
        outcomes: ``right``, ``left`` (the client has), or the error, with their numbers.
        wrong: a line for each wrong answer.
    """

    def __init__(self, service: Service, known: list[tuple[Question, Answer]], chance: random.Random) -> None:
        self._service, self._known, self._chance = service, known, chance
        self.num_events = 0
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._is_ending = False
        self._clients = [asyncio.create_task(self._ask_on()) for _ in range(NUM_CLIENTS)]

    def _on_event(self) -> None:
        self.num_events += 1

    async def _ask_on(self) -> None:
        async with new_session() as session:
            while not self._is_ending and not self._service.has_ended:
                question, right = self._chance.choice(self._known)
                leave_after = self._chance.randint(1, 60) if self._chance.random() < 0.15 else None
                answer = await ask(session, self._service, question, self._on_event, leave_after)
                outcome = answer.error or "right"
                if (not answer.begins(right)) if answer.error is not None else answer != right:
                    outcome = "wrong"
                    self.wrong.append(f"{question.kind}: {answer}, not {right}, of {question.body}")
                self.outcomes[outcome] += 1
                if outcome == "no answer":
                    await asyncio.sleep(0.1)

    async def end(self) -> None:
        """Ask nothing more, and wait until every open request has ended; each has a deadline of its own."""
        self._is_ending = True
        await asyncio.gather(*self._clients)
