"""Captures of the CUDA graphs that a worker has not captured before its first step. In the main thread of rank 0."""

from __future__ import annotations

from collections.abc import Callable, Generator
from time import monotonic
from typing import TYPE_CHECKING, Any

from hbserve.messages.worker import StepPlan
from hbserve.worker.rank_group import RankGroup

if TYPE_CHECKING:
    from hbserve.engine.model_runner import ModelRunner

_MAX_SHARE = 0.05
"""Share of the time that parts take beside steps. Under overload each step would wait for one: streams then have less
time to spare, and steps have fewer prompt tokens."""
_DONE: Any = object()


class Captures:
    """Does one capture at a time, in parts, between two launches; owner of the one under way.

    Args:
        runner: says which graphs are due, and captures them.
        ranks: the other ranks, which capture at the same place between plans.
    """

    def __init__(self, runner: ModelRunner, ranks: RankGroup) -> None:
        self._runner, self._ranks = runner, ranks
        self._under_way: Generator[None, None, None] | None = None
        self._resumes_at = 0.0  # beside steps

    def do_part(self, is_idle: bool) -> bool:
        """Do one part of the capture under way, or begin the next; False if none is due yet.

        Args:
            is_idle: see `ModelRunner.next_graph`.

        Raises:
            OSError: another rank is gone.
        """
        began = monotonic()
        if not is_idle and began < self._resumes_at:
            return False
        if self._under_way is None:
            graph = self._runner.next_graph(is_idle)
            if graph is None:
                return False
            self._ranks.capture(graph)
            self._under_way = self._runner.capture(graph)
        if next(self._under_way, _DONE) is _DONE:
            self._under_way = None
        ended = monotonic()
        self._resumes_at = ended + (ended - began) * (1 / _MAX_SHARE - 1)
        return True

    def do_before(self, plan: StepPlan, has_next: Callable[[], bool]) -> None:
        """Capture what a plan waits for. Errors as in `do_part`.

        Args:
            has_next: whether another plan has come behind it.
        """
        if plan.is_probe:  # it measures a step with its graph; a request that comes behind it does not wait for that
            while not has_next() and self.do_part(is_idle=True):
                pass
        if plan.role is not None and not self._runner.is_prepared_for(plan.role):
            while self._under_way is not None:  # the first graphs of a role are captured at once, and no two at a time
                self.do_part(is_idle=True)
        if (graph := self._runner.graph_before(plan)) is not None:
            self._ranks.capture(graph)
            for _ in self._runner.capture(graph):
                pass
            self._runner.note_delay()

    def close(self) -> None:
        """Give up the capture under way: the process ends."""
        if self._under_way is not None:
            self._under_way.close()
