"""Steps from their launch to their results: what every rank does with a plan.

Which plans an instance has taken and not finished, and for how long.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hbserve.engine.layer_progress import LayerProgress
from hbserve.messages.worker import StepPlan, StepResult

if TYPE_CHECKING:
    from hbserve.engine.model_runner import ModelRunner, PendingStep
    from hbserve.engine.step_board import BoardEntry


logger = logging.getLogger(__name__)


class UnfinishedSteps:
    """Plans in the order in which they came; of the event loop's thread alone."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, int], float] = {}  # (epoch, step) -> when it became the first
        self._none_left = asyncio.Event()
        self._none_left.set()

    def begin(self, plan: StepPlan) -> None:
        """A plan has come."""
        self._none_left.clear()
        self._since[plan.epoch, plan.step_id] = time.monotonic()

    def end(self, plan: StepPlan) -> None:
        """It is done, or dropped."""
        del self._since[plan.epoch, plan.step_id]
        if self._since:  # the clock of the next one starts now: it could not begin before
            self._since[next(iter(self._since))] = time.monotonic()
        else:
            self._none_left.set()

    async def wait_until_none(self) -> None:
        """Return when nothing is left."""
        await self._none_left.wait()

    async def watch(self, timeout_s: float) -> None:
        """Return when a step has taken longer than that."""
        while True:
            await asyncio.sleep(min(timeout_s / 4, 5.0))
            first = next(iter(self._since.values()), None)
            if first is not None and time.monotonic() - first > timeout_s:
                return


class _Launched(NamedTuple):
    """A step that is under way."""

    plan: StepPlan
    pending: PendingStep
    waited_s: float
    host_s: float
    progress: LayerProgress | None
    entry: BoardEntry | None


class StepPipeline:
    """Launches in the caller's thread, waits for results in another: on a GPU they come later.

    Args:
        on_done: called in the other thread with each plan and its result, in order.
        on_stored: called in either thread with a plan whose ``sends`` are of groups of layers, and the number of the
            group whose keys and values are in the cache now; before ``on_done``.
        on_failed: called in either thread, at most once in each, with the plan and its error. A step
            that fails leaves the device in an unknown state: nothing may be launched after it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        on_done: Callable[[StepPlan, StepResult], None],
        on_stored: Callable[[StepPlan, int], None],
        on_failed: Callable[[StepPlan, Exception], None],
    ) -> None:
        self._runner, self._on_done, self._on_stored, self._on_failed = runner, on_done, on_stored, on_failed
        self._pending: queue.SimpleQueue[_Launched | None] = queue.SimpleQueue()
        self._collector = threading.Thread(target=self._collect, name="collector")
        self._collector.start()

    def launch(self, plan: StepPlan, came_at: float | None = None) -> bool:
        """Start a step; False if it failed.

        Args:
            came_at: when its plan was here, on `time.perf_counter`; None: just now.
        """
        began = time.perf_counter()
        waited_s = 0.0 if came_at is None else began - came_at
        runner, progress = self._runner, None
        num_groups = max((send.layers.count for send in plan.sends), default=1)
        try:
            if num_groups > 1:
                on_stored = functools.partial(self._on_stored, plan)
                progress = LayerProgress(runner.spec.num_layers, num_groups, runner.platform.device, on_stored)
                pending = runner.launch(plan, progress.stored)
            else:
                pending = runner.launch(plan)
            host_s = time.perf_counter() - began
            entry = None if runner.board is None else runner.board.entry(plan)
            self._pending.put(_Launched(plan, pending, waited_s, host_s, progress, entry))
        except Exception as error:
            self._fail(plan, error)
            return False
        return True

    def close(self) -> None:
        """Wait for what has been launched."""
        self._pending.put(None)
        self._collector.join()

    def _collect(self) -> None:
        last_end = math.inf
        while (item := self._pending.get()) is not None:
            plan, pending, waited_s, host_s, progress, entry = item
            try:
                if progress is not None:
                    progress.wait()
                result = pending.result()
                if max(result.token_ids, default=0) >= self._runner.spec.vocab_size:
                    # The sampler has found no greatest logit, and the next step must not be fed with that.
                    raise RuntimeError("the logits of a step are not numbers")
            except Exception as error:
                self._fail(plan, error)
                return
            if entry is not None:
                assert self._runner.board is not None, "an entry is of a board"
                self._runner.board.note(entry, result.token_ids)
            end = time.perf_counter()
            began = end - result.busy_s
            early_s = waited_s + (began - pending.ready_at) - max(0.0, began - last_end)
            last_end = end
            if progress is not None:
                progress.finish()
            self._on_done(plan, msgspec.structs.replace(result, host_s=host_s, early_s=early_s))

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        logger.error("step %d failed", plan.step_id, exc_info=error)
        self._on_failed(plan, error)


def failed_result(plan: StepPlan, error: str) -> StepResult:
    """What is reported of a step that failed."""
    return StepResult(epoch=plan.epoch, step_id=plan.step_id, token_ids=[], logprobs=None, busy_s=0.0, error=error)
