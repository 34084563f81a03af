"""The steps of a rank from their launch to their results, and the plans that are not finished.

`StepPipeline` is in the main thread and in the collector thread, `UnfinishedSteps` in the event loop thread of rank 0.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from hbserve.messages.worker import StepPlan, StepRef
from hbserve.speculation.rounds import next_round
from hbserve.worker.events import LayersStored, RoundDone, StepDone, StepEvent, StepFailed

if TYPE_CHECKING:
    from hbserve.engine.model_runner import ModelRunner, PendingStep
    from hbserve.engine.step_board import BoardEntry

logger = logging.getLogger(__name__)


class UnfinishedSteps:
    """Plans that have come and are neither done nor dropped, in the order in which they came.

    Not thread-safe: only the event loop's thread uses it.
    """

    def __init__(self) -> None:
        self._since: dict[tuple[int, int], float] = {}  # (epoch, step) -> when it became the first
        self._after: dict[tuple[int, int], StepRef] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()

    def begin(self, plan: StepPlan) -> None:
        """Note a plan that has come."""
        self._none_left.clear()
        self._since[plan.epoch, plan.step_id] = time.monotonic()
        if plan.after is not None:
            self._after[plan.epoch, plan.step_id] = plan.after

    def end(self, plan: StepPlan) -> None:
        """Note that a plan's step is done, or that the plan was dropped."""
        del self._since[plan.epoch, plan.step_id]
        self._after.pop((plan.epoch, plan.step_id), None)
        if self._since:  # the time of the next step counts from now: it could not begin before
            self._since[next(iter(self._since))] = time.monotonic()
        else:
            self._none_left.set()

    @property
    def awaited(self) -> list[StepRef]:
        """Steps of other workers that the plans wait for."""
        return list(self._after.values())

    async def wait_until_none(self) -> None:
        """Return when no plan is left."""
        await self._none_left.wait()

    async def wait_for_hung_step(self, timeout_s: float) -> None:
        """Return when a step has taken longer than ``timeout_s``."""
        while True:
            await asyncio.sleep(min(timeout_s / 4, 5.0))
            first = next(iter(self._since.values()), None)
            if first is not None and time.monotonic() - first > timeout_s:
                return


class LayerProgress:
    """A report for each of several equal groups of layers, when the group's keys and values are in the cache.

    Args:
        num_layers: in a block, also what is stored behind the model's own.
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


class _LaunchedStep(NamedTuple):
    plan: StepPlan
    pending: PendingStep
    waited_s: float
    host_s: float
    progress: LayerProgress | None
    entry: BoardEntry | None
    more: bool


class StepPipeline:
    """Steps under way: the caller's thread launches, the collector thread waits for the results.

    On a GPU a result comes later than the launch returns.

    Args:
        post: called in either thread with what happens to a step: `StepDone` in the order of the plans, `RoundDone`
            before it for all rounds of a step but the last, `LayersStored`
            for plans whose ``sends`` are of groups of layers, `StepFailed` at most once in each thread.
    """

    def __init__(self, runner: ModelRunner, post: Callable[[StepEvent], None]) -> None:
        self._runner, self._post = runner, post
        self._launched: queue.SimpleQueue[_LaunchedStep | None] = queue.SimpleQueue()
        self._num_launched = self._num_done = 0  # one thread writes each
        self._collector = threading.Thread(target=self._collect, name="collector")
        self._collector.start()

    @property
    def is_idle(self) -> bool:
        """Whether every launched step is done; from the launching thread."""
        return self._num_done == self._num_launched

    def launch(self, plan: StepPlan, came_at: float | None = None) -> bool:
        """Launch a step; return False if it failed.

        Args:
            came_at: when its plan came, on `time.perf_counter`; None: just now.
        """
        began = time.perf_counter()
        waited_s = 0.0 if came_at is None else began - came_at
        runner, progress = self._runner, None
        num_groups = max((send.layers.count for send in plan.sends), default=1)
        try:
            if num_groups > 1:
                progress = LayerProgress(
                    runner.layout.num_stored_layers,
                    num_groups,
                    runner.platform.device,
                    lambda group: self._post(LayersStored(plan, group)),
                )
                pending = runner.launch(plan, progress.stored)
            else:
                pending = runner.launch(plan)
            entry = None if runner.board is None else runner.board.entry(plan)
            self._num_launched += 1
            following = plan
            ahead = runner.repeat(plan) if plan.rounds > 1 else None
            while True:
                host_s = time.perf_counter() - began
                # waits for the device: the next round's plan depends on this one's tokens
                after = next_round(following, pending.result(), runner.end_tokens_of) if following.rounds > 1 else None
                more = after is not None or ahead is not None
                step = _LaunchedStep(plan, pending, waited_s, host_s, progress, entry, more)
                if not more:
                    self._launched.put(step)
                    break
                # the round behind the end of all outputs is reported, too: until then it writes to their blocks
                following = msgspec.structs.replace(following, rounds=1) if after is None else after
                began, waited_s = time.perf_counter(), 0.0
                try:
                    pending = runner.launch(following) if ahead is None else ahead
                    ahead = runner.repeat(following) if following.rounds > 1 else None
                finally:  # only now: the collector would take the interpreter from the launch, and the device waits
                    self._launched.put(step)
        except Exception as error:
            self._fail(plan, error)
            return False
        return True

    def close(self) -> None:
        """Wait until all launched steps are done."""
        self._launched.put(None)
        self._collector.join()

    def _collect(self) -> None:
        last_end = math.inf
        while (step := self._launched.get()) is not None:
            plan, pending, waited_s, host_s, progress, entry, more = step
            try:
                if progress is not None:
                    progress.wait()
                result = pending.result()
                if max(result.token_ids, default=0) >= self._runner.spec.vocab_size:
                    # The sampler found no largest logit. The next step must not compute with such a token.
                    raise RuntimeError("the logits of a step are not numbers")
            except Exception as error:
                self._fail(plan, error)
                return
            if entry is not None:
                assert self._runner.board is not None, "only a board has entries"
                self._runner.board.note(entry, result.token_ids)
            end = time.perf_counter()
            began = end - result.busy_s
            early_s = waited_s + (began - pending.ready_at) - max(0.0, began - last_end)
            last_end = end
            if progress is not None:
                progress.finish()
            result = msgspec.structs.replace(result, host_s=host_s, early_s=early_s, more=more)
            if more:
                self._post(RoundDone(result))
                continue
            self._num_done += 1
            self._post(StepDone(plan, result))

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        logger.error("step %d failed", plan.step_id, exc_info=error)
        self._post(StepFailed(plan, error))
