"""A worker whose steps take any time and whose drafts promise anything: it loses hardly anything to its drafts."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest

from hbserve import SamplingParams
from hbserve.messages.client import AddRequest
from hbserve.speculation.measured_gain import GainMeter, Tried
from tests.support.scheduler_parts import SchedulerParts

GAP_S = 0.7e-3


@dataclass
class World:
    """A worker with random step times; drafts gain by a factor that changes over time, and promise another one.

    Attributes:
        now: time; plain_s: time in which all tokens so far would have come without drafts.
        gain: of a step with drafts; promise: what the scheduler predicts.
        drift: part by which the host gets slower and faster, all in 1000 steps.
    """

    rng: random.Random
    meter: GainMeter = field(default_factory=GainMeter)
    now: float = 0.0
    plain_s: float = 0.0
    gain: float = 1.0
    promise: float = 1.0
    num_sequences: int = 8
    has_drafted: bool = False
    num_drafting: int = 0

    def __post_init__(self) -> None:
        rng = self.rng
        self.fixed_s, self.per_row_s, self.per_key_s = rng.uniform(0.5e-3, 8e-3), rng.uniform(0, 1e-4), 2e-8
        self.noise, self.drift, self.num_steps = rng.choice((0.0, 0.05, 0.2)), rng.choice((0.0, 0.3)), 0
        self.gains = sorted(rng.uniform(0.6, 2.5) for _ in range(2))

    def step(self) -> None:
        """Do one step, with drafts or without, as the meter wants it."""
        rng, keys = self.rng, 500 * self.num_sequences
        size = self.meter.size_of(self.num_sequences, False)
        looks = self.meter.may_look(size)
        drafts = looks and self.promise > 1.1 and self.meter.permits(size, self.promise)
        plain_s = self.fixed_s + self.per_row_s * self.num_sequences + self.per_key_s * keys
        plain_s *= 1 + self.drift * math.sin(self.num_steps / 1000 * math.tau)
        seconds, num_tokens = plain_s, self.num_sequences
        if drafts:
            num_tokens = max(1, round(self.num_sequences * rng.uniform(1.2, 2.8)))
            seconds = num_tokens / self.num_sequences * plain_s / self.gain
        seconds *= rng.uniform(1 - self.noise, 1 + self.noise)
        if drafts != self.has_drafted:
            seconds += GAP_S
        self.meter.on_planned(self.now, was_idle=False)
        self.now += seconds
        self.plain_s += num_tokens / self.num_sequences * plain_s
        tried = Tried(size, self.num_sequences, keys, looks, self.promise if drafts else 0.0)
        self.meter.on_result(self.now, tried, num_tokens)
        self.has_drafted = drafts
        self.num_drafting += drafts
        self.num_steps += 1

    def change(self, are_promises_true: bool) -> None:
        """Change what drafts gain and promise, and now and then the batch."""
        self.gain = self.rng.choice(self.gains)
        self.promise = self.gain if are_promises_true else self.rng.uniform(1.0, 3.0)
        if self.rng.random() < 0.3:
            self.num_sequences = self.rng.choice((1, 2, 3, 8, 30, 60))


@pytest.mark.parametrize("seed", range(6))
def test_drafts_lose_at_most_two_percent_whatever_they_promise(seed: int) -> None:
    world = World(random.Random(seed))
    begin, windows = (0.0, 0.0), []
    for number in range(9000):
        if number % 150 == 0:
            world.change(are_promises_true=False)
        world.step()
        if number % 3000 == 2999:
            windows.append((world.plain_s - begin[1]) / (world.now - begin[0]))
            begin = world.now, world.plain_s
    assert min(windows[1:]) >= (0.96 if world.drift else 0.98), windows
    assert windows[0] >= 0.96, windows


@pytest.mark.parametrize(("gain", "drift"), [(1.2, 0.0), (1.5, 0.3), (3.0, 0.3)])
def test_drafts_that_gain_are_tried_nearly_always(gain: float, drift: float) -> None:
    world = World(random.Random(1))
    world.noise, world.drift = 0.1, drift
    world.gain = world.promise = gain
    for _ in range(3000):
        world.step()
    assert world.num_drafting > 0.9 * 3000
    assert world.plain_s / world.now > 1 + 0.9 * (gain - 1)


def test_first_steps_that_capture_graphs_do_not_stop_drafts_that_gain() -> None:
    world = World(random.Random(1))
    world.noise, world.drift, world.gain, world.promise = 0.05, 0.0, 1.5, 1.5
    for number in range(2000):
        world.step()
        if 10 <= number < 400 and number % 16 < 2:
            world.now += 0.03
    assert world.num_drafting > 1000


def test_a_try_is_made_again_some_time_after_a_failure() -> None:
    world = World(random.Random(1))
    world.noise, world.drift, world.gain, world.promise = 0.0, 0.0, 0.8, 1.5
    for _ in range(500):
        world.step()
    assert 0 < world.num_drafting < 30
    world.gain, world.num_drafting = 1.5, 0
    for _ in range(2000):
        world.step()
    assert world.num_drafting > 1000


def test_results_that_come_together_take_no_time() -> None:
    meter, size = GainMeter(), GainMeter.size_of(4, False)
    for _ in range(200):
        meter.on_planned(1.0, was_idle=False)
        meter.on_result(1.0, Tried(size, 4, 100, meter.may_look(size)), 4)
    assert meter.may_look(size)


def test_steps_after_an_idle_time_or_with_prompts_do_not_count() -> None:
    meter, now, size = GainMeter(), 0.0, GainMeter.size_of(4, False)
    for number in range(20):
        now += 0.01
        if number % 2:
            meter.on_result(now, None, 4)
        else:
            meter.on_planned(now, was_idle=True)
            meter.on_result(now + 0.001, Tried(size, 4, 100), 4)
    assert not meter.may_look(size)


def test_only_steps_of_sequences_with_drafters_are_measured() -> None:
    for predicted in (None, [7, 7, 8]):
        parts = SchedulerParts()
        request = AddRequest("a", [1] * 20, [], SamplingParams(max_tokens=50), predicted_token_ids=predicted)
        assert parts.requests.admit(parts.add_request(request))
        parts.steps(1)  # its prompt
        assert parts.plan()
        tried = parts.worker.inflight[-1].tried
        assert (tried is not None) == (predicted is not None)
