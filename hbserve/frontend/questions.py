"""The questions of a client to the scheduler: statistics, and changes of instances. Runs in the client's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hbserve.errors import EngineDeadError, SchedulerRestartingError
from hbserve.messages.admin import GetLoad, GetStats, RemoveInstance, SetRole

Question = GetStats | GetLoad | SetRole | RemoveInstance


@dataclass(slots=True)
class _Open:
    """A question without an answer; ``is_sent``: the present scheduler has it."""

    message: Question
    answer: asyncio.Future[dict[str, Any]]
    is_sent: bool = False


class Questions:
    """All questions that have no answer yet. They wait while there is no scheduler.

    Args:
        send: sends a message; returns False while there is no scheduler.
    """

    def __init__(self, send: Callable[[Question], bool]) -> None:
        self._send = send
        self._open: dict[int, _Open] = {}

    async def ask(self, message: Question, timeout_s: float) -> dict[str, Any]:
        """Return the answer.

        Raises:
            TimeoutError: if it does not come in time.
            SchedulerRestartingError: if the scheduler has ended while it made a change.
            EngineDeadError: given to `fail`.
        """
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[message.query_id] = _Open(message, answer)
        self.send_all()
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` forgets a cancellation that comes with the answer
                return await answer
        finally:
            del self._open[message.query_id]

    def send_all(self) -> None:
        """Send the questions that the present scheduler does not have."""
        for question in self._open.values():
            if not question.is_sent:
                question.is_sent = self._send(question.message)

    def on_scheduler_lost(self, reason: str) -> None:
        """The scheduler is lost: the next one is asked again, unless the question was for a change."""
        for question in self._open.values():
            if isinstance(question.message, GetStats | GetLoad):
                question.is_sent = False
            elif question.is_sent and not question.answer.done():
                what = f"{reason} before it answered, so it is unknown what has changed; look, and ask again"
                question.answer.set_exception(SchedulerRestartingError(what))

    def on_answer(self, query_id: int, answer: dict[str, Any]) -> None:
        """An answer has come."""
        question = self._open.get(query_id)
        if question is not None and not question.answer.done():
            question.answer.set_result(answer)

    def fail(self, error: EngineDeadError) -> None:
        """End all questions: no answer will come."""
        for question in self._open.values():
            if not question.answer.done():
                question.answer.set_exception(error)
