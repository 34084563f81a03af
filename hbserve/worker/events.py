"""The events of a rank's process, and the queue that brings them to its event loop.

    main thread       StepFailed, StepDropped, StepsEnded, on a CPU LayersStored ─┐ post
    collector thread  LayersStored, StepDone, StepFailed ─────────────────────────┤ post
    lanes' threads    BlocksCopied ───────────────────────────────────────────────┤ post
    event loop thread TransferReplied, RankFailed, commands ──────────────────────┤ handle
                                                                                  ▼
                                           EventQueue ─► on_event: one `match`, in the event loop thread

A command of the scheduler or of rank 0 is an event as it is: it needs no other type around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, NamedTuple, TypeVar

from hbserve.messages.supervisor import ReportEvent
from hbserve.messages.tiers import FindBlocks, FoundBlocks, TierCommand, TierResult
from hbserve.messages.transfer import TransferCommand, TransferReply
from hbserve.messages.worker import InstanceFailed, Shutdown, StepLost, StepPlan, StepResult

logger = logging.getLogger(__name__)


class LayersStored(NamedTuple):
    """A group of layers of a step has its keys and values in the KV cache. Always before the step's `StepDone`."""

    plan: StepPlan
    group: int


class StepDone(NamedTuple):
    """A step is done; in the order of the plans."""

    plan: StepPlan
    result: StepResult


class RoundDone(NamedTuple):
    """A round of a step is done, and another one is under way."""

    result: StepResult


class StepFailed(NamedTuple):
    """A step has failed. The device is in an unknown state, so no step is launched after it."""

    plan: StepPlan
    error: Exception

    def result(self) -> StepResult:
        """Return the result that reports the failure to the scheduler."""
        epoch, step_id = self.plan.epoch, self.plan.step_id
        return StepResult(epoch=epoch, step_id=step_id, token_ids=[], logprobs=None, busy_s=0.0, error=repr(self.error))


class StepDropped(NamedTuple):
    """A plan was not launched, because it is of an epoch that is over."""

    plan: StepPlan


class StepsEnded(NamedTuple):
    """No step is under way, and none will be launched: the event loop ends."""


class TransferReplied(NamedTuple):
    """One rank's part of a transfer or of a link has ended."""

    rank: int
    reply: TransferReply


class BlocksCopied(NamedTuple):
    """One rank's part of a copy to or from a KV tier has ended; from the thread of a lane."""

    rank: int
    result: TierResult


class RankFailed(NamedTuple):
    """A rank other than 0 reports a failed step, or an epoch that it cannot begin."""

    rank: int
    reply: StepResult | InstanceFailed


StepEvent = LayersStored | RoundDone | StepDone | StepFailed
RankEvent = StepEvent | StepsEnded | TransferReplied | BlocksCopied | StepLost | TransferCommand | TierCommand
"""What the event loop of every rank handles."""
WorkerEvent = RankEvent | StepDropped | RankFailed | StepPlan | Shutdown | ReportEvent | FindBlocks | FoundBlocks
"""What the event loop of rank 0 handles."""

E = TypeVar("E")


class EventQueue(Generic[E]):
    """Events from all threads of a process to one handler, in the order in which they came.

    Several events cost one wake-up of the event loop, and the wake-up handles all that are there. A flag says that
    a wake-up is on its way. `post` appends the event before it reads the flag, and the event loop clears the flag
    before it looks for events: so no event is left behind, without a lock.

    Args:
        on_event: called in the thread that runs `loop`, with one event after the other. An error that it raises
            ends `serve`.
    """

    def __init__(self, on_event: Callable[[E], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self._on_event = on_event
        self._events: deque[E] = deque()
        self._is_woken = self._is_handling = False
        self._end: asyncio.Future[None] = self.loop.create_future()

    def post(self, event: E) -> None:
        """Have the event loop handle an event. Callable from any other thread, even before the loop runs."""
        self._events.append(event)
        if not self._is_woken:
            self._is_woken = True
            self.loop.call_soon_threadsafe(self._handle_all)

    def handle(self, event: E) -> None:
        """Handle an event now, after those that have been posted; from the event loop's thread.

        Inside a handler: when the handler returns.
        """
        self._events.append(event)
        self._handle_all()

    def _handle_all(self) -> None:
        self._is_woken = False
        if self._is_handling:
            return
        self._is_handling = True
        while self._events:
            try:
                self._on_event(self._events.popleft())
            except Exception as error:
                self._fail(error)
        self._is_handling = False

    async def serve(self, *coroutines: Coroutine[Any, Any, None]) -> None:
        """Run coroutines in the event loop until `end`; then cancel those that have not ended.

        Raises:
            Exception: the first one of the handler or of a coroutine.
        """
        tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
        for task in tasks:
            task.add_done_callback(self._on_task_done)
        await self._end
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def end(self) -> None:
        """Have `serve` return; from the event loop's thread."""
        if not self._end.done():
            self._end.set_result(None)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._end.done():
            logger.error("an event failed while the event loop ended", exc_info=error)
        else:
            self._end.set_exception(error)
