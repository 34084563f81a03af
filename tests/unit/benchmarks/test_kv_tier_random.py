"""How the random load on KV tiers compares answers."""

from __future__ import annotations

import math

import pytest

from benchmarks.kv_tier_random import Answer, compare

KNOWN = Answer([5, 6, 7], [{5: -0.1}, {6: -1.0, 8: -1.125}, {7: -0.5}])


@pytest.mark.parametrize(
    ("answer", "place", "drift"),
    [
        (Answer([5, 6], [{5: -0.1}, {6: -1.0}]), None, 0.0),
        (Answer([5, 6], [{5: -0.35}, {6: -1.0}]), None, 0.25),
        (Answer([5, 8], [{5: -0.1}, {8: -1.0, 6: -1.25}]), 1, 0.25),
        (Answer([5, 8, 9], [{5: -0.1}, {8: -1.125, 4: -1.25}, {9: 0.0}]), 1, 0.0),
        (Answer([3], [{3: -0.1}]), 0, math.inf),
    ],
)
def test_answers_are_compared_up_to_the_first_place_where_they_part(
    answer: Answer, place: int | None, drift: float
) -> None:
    found_place, found_drift = compare(answer, KNOWN)
    assert found_place == place
    assert found_drift == pytest.approx(drift)
