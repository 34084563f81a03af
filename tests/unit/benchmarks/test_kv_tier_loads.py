"""How the random load on KV tiers compares answers."""

from __future__ import annotations

import math

import pytest

from benchmarks.kv_tier_loads import _Answer, _Known

KNOWN = _Answer([5, 6, 7], [{5: -0.1}, {6: -1.0, 8: -1.125}, {7: -0.5}])


@pytest.mark.parametrize(
    ("answer", "gap"),
    [
        (_Answer([5, 6], [{5: -0.1}, {6: -1.0}]), None),
        (_Answer([5, 8], [{5: -0.1}, {8: -1.0, 6: -1.25}]), 0.25),
        (_Answer([5, 8, 9], [{5: -0.1}, {8: -1.0, 4: -1.25}, {9: 0.0}]), math.inf),
        (_Answer([3], [{3: -0.1, 5: -0.1}]), math.inf),
    ],
)
def test_answers_part_at_tokens_that_are_nearly_as_likely(answer: _Answer, gap: float | None) -> None:
    known = _Known([1, 2], KNOWN)
    assert known.gap(answer) == gap
    assert known.answer is KNOWN


def test_the_longer_answer_is_kept() -> None:
    known = _Known([1, 2])
    assert known.gap(KNOWN) is None
    assert known.answer is KNOWN
