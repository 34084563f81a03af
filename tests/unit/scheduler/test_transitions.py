"""The phases of a request: every legal transition happens in the real scheduler, and every other one is refused.

Covered, each by the case of its name in `CASES`: waiting -> prefilling, finished; prefilling -> transferring,
decoding, waiting, finished; transferring -> decoding, waiting, finished; decoding -> waiting, finished.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from hbserve.scheduler.sequence import TRANSITIONS, Phase, Sequence
from tests.support.scheduler_parts import SchedulerParts

WAITING, PREFILLING, TRANSFERRING, DECODING, FINISHED = Phase
Event = Callable[[SchedulerParts, Sequence], object]


def admit(parts: SchedulerParts, sequence: Sequence) -> None:
    assert parts.requests.admit(sequence)


def compute_prompt(parts: SchedulerParts, sequence: Sequence) -> None:
    parts.steps(1)


def lose_decode_memory(parts: SchedulerParts, sequence: Sequence) -> None:
    parts.lose_memory(parts.instances["decode-0"])


def decode_to_the_end(parts: SchedulerParts, sequence: Sequence) -> None:
    [worker] = parts.instances["decode-0"].workers.values()
    while sequence.phase is DECODING:
        assert parts.planner.plan_step(parts.instances["decode-0"], worker, {worker.role})
        parts.confirm(worker)


PATH: list[tuple[Phase, Event]] = [
    (WAITING, admit),
    (PREFILLING, compute_prompt),
    (TRANSFERRING, lambda parts, sequence: parts.end_transfers(sequence)),
]
"""The phases before decode in mode disaggregated, each with the event that ends it."""

CASES: dict[tuple[Phase, Phase], tuple[str, Event]] = {
    (WAITING, PREFILLING): ("disaggregated", admit),
    (WAITING, FINISHED): ("disaggregated", lambda parts, sequence: parts.requests.finish(sequence, "abort")),
    (PREFILLING, TRANSFERRING): ("disaggregated", compute_prompt),
    (PREFILLING, DECODING): ("unified", compute_prompt),
    (PREFILLING, WAITING): ("disaggregated", lambda parts, sequence: parts.requests.preempt(sequence)),
    (PREFILLING, FINISHED): ("disaggregated", lambda parts, sequence: parts.requests.fail(sequence, "test")),
    (TRANSFERRING, DECODING): ("disaggregated", lambda parts, sequence: parts.end_transfers(sequence)),
    (TRANSFERRING, WAITING): ("disaggregated", lambda parts, sequence: parts.end_transfers(sequence, error="test")),
    (TRANSFERRING, FINISHED): ("disaggregated", lambda parts, sequence: parts.requests.abort_all_of(sequence.client)),
    (DECODING, WAITING): ("disaggregated", lose_decode_memory),
    (DECODING, FINISHED): ("disaggregated", decode_to_the_end),
}
LEGAL = [(before, after) for before, phases in TRANSITIONS.items() for after in phases]


def test_every_legal_transition_has_a_case() -> None:
    assert set(CASES) == set(LEGAL)


@pytest.mark.parametrize(("before", "after"), list(CASES), ids=str)
def test_a_legal_transition_and_the_memory_held_after_it(before: Phase, after: Phase) -> None:
    mode, event = CASES[before, after]
    parts = SchedulerParts(mode)
    sequence = parts.add("a", max_tokens=3)
    for phase, end in PATH:
        if sequence.phase is before:
            break
        assert sequence.phase is phase
        end(parts, sequence)
    assert sequence.phase is before
    event(parts, sequence)
    assert sequence.phase is after
    held = {allocation.instance_id for allocation in sequence.allocations}
    everywhere = set(parts.instances)
    expected = {PREFILLING: everywhere, TRANSFERRING: {"decode-0"}, DECODING: everywhere - {"prefill-0"}}
    assert held == expected.get(after, set())
    parts.end_transfers(sequence)
    for instance in parts.instances.values():
        slots = instance.allocations.keys() | instance.reserved.keys()
        assert (sequence in slots) is (instance.id in held)
        instance.pool.check_consistency()


@pytest.mark.parametrize(("before", "after"), sorted(set(product(Phase, Phase)) - set(LEGAL)), ids=str)
def test_an_illegal_transition_is_an_assertion_error(before: Phase, after: Phase) -> None:
    parts = SchedulerParts()
    sequence = parts.add("a")
    sequence.phase = before
    with pytest.raises(AssertionError, match=f"{before} -> {after} is no transition"):
        sequence.enter(after)
    assert sequence.phase is before
