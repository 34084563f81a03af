"""Rate of decode beside prefill, and the share level of a step."""

from __future__ import annotations

import itertools

import pytest

from hbserve.policy.decode_throttle import DecodeThrottle, choose_percentage


def test_the_share_is_used_while_both_phases_are_busy_and_the_largest_level_alone() -> None:
    assert choose_percentage([40, 60, 100], 60, alone=False) == 60
    assert choose_percentage([40, 100], 60, alone=False) == 40  # the nearest, while a worker is being replaced
    assert choose_percentage([40, 60, 100], 40, alone=True) == 100


def test_decode_gets_its_steps_in_bursts_and_no_more() -> None:
    throttle = DecodeThrottle(0.03)
    throttle.on_idle(10.0)
    now, opened, steps = 10.0, [], 0
    for _ in range(400):  # prefill steps of 50 ms; decode steps of 10 ms in those that are beside it
        opened.append(throttle.update(now))
        for _ in range(5 * opened[-1]):
            throttle.on_decode_step()
            steps += 1
        now += 0.05
    assert not opened[0]  # prompts that arrive first have the device
    assert steps == pytest.approx(400 * 0.05 / 0.03, abs=6)
    assert sum(earlier != later for earlier, later in itertools.pairwise(opened)) < 300
    throttle.on_idle(now)
    assert not throttle.update(now)
    assert throttle.update(now + 0.02, 0.01)  # a request needs a token sooner
    assert not throttle.is_overdue
    assert throttle.is_behind
    throttle.on_decode_step()
    throttle.on_decode_step()
    assert not throttle.is_behind  # the next step is planned when these have ended
    assert throttle.update(now + 1.0)
    assert throttle.is_overdue
    throttle.on_idle(now + 2.0)
    assert not throttle.update(now + 2.0, None, 0.06, 0.05)
    assert throttle.update(now + 2.0, None, 0.04, 0.05)  # one of few tokens cannot wait for a prefill step
    assert not throttle.is_overdue
    throttle.update(now + 2.0, None, -0.01, 0.05)
    assert throttle.is_overdue  # nor for the one under way
