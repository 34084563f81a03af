"""Which plan waits for which capture of CUDA graphs. There are none on a CPU, so a stand-in counts their parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hbserve.config import InstanceRole
from hbserve.messages.rank import CaptureGraph
from hbserve.messages.worker import StepPlan
from hbserve.worker.captures import Captures

_PARTS = 4


class Runner:
    """Two sizes to capture, of `_PARTS` parts each, and one that a plan must wait for if ``is_whole``."""

    def __init__(self, is_whole: bool = False) -> None:
        self.missing = [1, 2]
        self.is_whole = is_whole
        self.done: list[str] = []

    def next_graph(self, is_idle: bool) -> CaptureGraph | None:
        return CaptureGraph(phase=InstanceRole.DECODE, size=self.missing[0]) if self.missing and is_idle else None

    def graph_before(self, plan: StepPlan) -> CaptureGraph | None:
        return CaptureGraph(phase=InstanceRole.DECODE, size=8) if self.is_whole else None

    def is_prepared_for(self, role: InstanceRole) -> bool:
        return role is not InstanceRole.PREFILL

    def capture(self, graph: CaptureGraph) -> Iterator[None]:
        for part in range(_PARTS):
            self.done.append(f"{graph.size}.{part}")
            if part < _PARTS - 1:
                yield
        if graph.size in self.missing:
            self.missing.remove(graph.size)

    def note_delay(self) -> None:
        self.done.append("delay")


class Ranks:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def capture(self, graph: CaptureGraph) -> None:
        self.sizes.append(graph.size)


def make(runner: Runner) -> tuple[Captures, Ranks]:
    ranks: Any = Ranks()
    any_runner: Any = runner
    return Captures(any_runner, ranks), ranks


def plan(is_probe: bool = False, role: InstanceRole | None = None) -> StepPlan:
    return StepPlan(epoch=0, step_id=1, rows=[], new_sequences=[], sends=[], is_probe=is_probe, role=role)


def test_a_probe_waits_for_all_captures_until_another_plan_comes() -> None:
    runner = Runner()
    captures, ranks = make(runner)
    captures.do_before(plan(is_probe=True), lambda: len(runner.done) == 3)
    assert runner.done == ["1.0", "1.1", "1.2"], "a request waits for the part under way, and for no other"
    captures.do_before(plan(), lambda: False)
    assert len(runner.done) == 3, "no request waits for a capture that goes on beside steps"
    captures.do_before(plan(is_probe=True), lambda: False)
    assert runner.done == [f"{size}.{part}" for size in (1, 2) for part in range(_PARTS)]
    assert ranks.sizes == [1, 2]
    assert not captures.do_part(is_idle=True)


def test_the_capture_under_way_ends_before_those_of_a_new_role() -> None:
    runner = Runner()
    captures, _ = make(runner)
    assert captures.do_part(is_idle=True)
    captures.do_before(plan(role=InstanceRole.DECODE), lambda: False)
    assert runner.done == ["1.0"]
    captures.do_before(plan(role=InstanceRole.PREFILL), lambda: False)
    assert runner.done == [f"1.{part}" for part in range(_PARTS)], "and no other begins while there is work"


def test_beside_steps_parts_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is never idle asks each 10 ms whether it may do a part, which takes 2 ms."""
    now_s, part_s, num_parts = 0.0, 2e-3, 0
    monkeypatch.setattr("hbserve.worker.captures.monotonic", lambda: now_s)

    class SlowRunner(Runner):
        def capture(self, graph: CaptureGraph) -> Iterator[None]:
            nonlocal now_s
            while True:
                now_s += part_s
                yield

    captures, _ = make(SlowRunner())
    assert captures.do_part(is_idle=True)
    began_s = now_s
    while now_s < began_s + 10:
        num_parts += captures.do_part(is_idle=False)
        now_s += 10e-3
    assert 0.03 < num_parts * part_s / 10 <= 0.05
    assert captures.do_part(is_idle=True), "an idle worker does not wait between parts"


def test_where_captures_cannot_go_on_beside_steps_a_plan_waits_for_a_whole_one() -> None:
    runner = Runner(is_whole=True)
    captures, ranks = make(runner)
    captures.do_before(plan(), lambda: False)
    assert runner.done == [*(f"8.{part}" for part in range(_PARTS)), "delay"]
    assert ranks.sizes == [8]
