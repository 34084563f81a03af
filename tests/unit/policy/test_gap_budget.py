"""Gaps between the tokens of a stream where targets are a guess: bounded, and longer only if many prompts wait."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve.policy.gap_budget import LONGEST_GAP, MANY_PROMPTS, GapBudget

TPOT_S, STEP_S, EPSILON_S = 0.04, 0.05, 1e-9
"""The target, and the longest step of prompts alone."""


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.001, 0.2)), min_size=20, max_size=80))
def test_no_gap_is_longer_than_its_prompts_allow(loads: list[tuple[float, float]]) -> None:
    """Whatever waits: each gap ends in time, or after one step with decode rows if these alone take too long."""
    budget, now, began, gap_s = GapBudget(), 0.0, 0.0, 0.0
    for prompts_s, decode_s in loads:
        if now == began:
            gap_s = (LONGEST_GAP if prompts_s > MANY_PROMPTS * TPOT_S else 1.0) * TPOT_S
        alone_s = min(prompts_s, STEP_S)
        limit_s = budget.limit_s(now, TPOT_S, prompts_s, alone_s, decode_s)
        if limit_s == math.inf:
            now += alone_s
            assert now - began + decode_s <= gap_s + EPSILON_S
            continue
        now += max(decode_s, min(limit_s, decode_s + alone_s))
        if limit_s > decode_s and gap_s == TPOT_S:
            assert now - began <= gap_s + EPSILON_S
        assert now - began <= gap_s + decode_s + TPOT_S + EPSILON_S
        budget.on_decode_step()
        began = now


def test_decode_rows_take_turns_with_the_prompts_that_wait() -> None:
    def alone(prompts_s: float, decode_s: float) -> int:
        """Return how many steps have prompts alone before one has decode rows."""
        budget, begins_at, count = GapBudget(), 7.0, 0
        while budget.limit_s(begins_at, TPOT_S, prompts_s, min(prompts_s, STEP_S), decode_s) == math.inf:
            begins_at, count = begins_at + STEP_S, count + 1
        return count

    assert alone(prompts_s=0.02, decode_s=0.005) == 1  # a short prompt goes ahead; the rows follow within the target
    assert alone(prompts_s=0.038, decode_s=0.005) == 0  # it is computed beside them
    assert alone(prompts_s=1.0, decode_s=0.005) == 2  # many wait
    assert alone(prompts_s=1.0, decode_s=0.2) == 0  # slow rows are not left out
    budget = GapBudget()
    assert budget.limit_s(0.0, TPOT_S, 1.0, STEP_S, 0.2) == 0.2 + TPOT_S  # and leave time for prompts
