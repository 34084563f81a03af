"""What the order of prompts promises, on the real core and the simulated clock: no request starves."""

from __future__ import annotations

from functools import cache

import pytest

from hbserve.config import InstanceRole
from hbserve.policy.profile_file import profiled_predictor
from hbserve.policy.queue_policy import OVERDUE_SHARE, OVERDUE_TARGETS
from hbserve.policy.step_time_predictor import StepTimePredictor
from hbserve.simulate.config import Sizes, make_config
from hbserve.simulate.requests import SimulatedRequest
from hbserve.simulate.world import SimulatedSystem
from tests.support.simulated_load import poisson

TTFT_MS, TPOT_MS = 300.0, 40.0


@cache
def steps() -> StepTimePredictor:
    return profiled_predictor()


@pytest.mark.parametrize(("roles", "rate"), [(("unified",), 40.0), (("prefill", "decode"), 55.0)])
def test_under_overload_no_request_starves(roles: tuple[str, ...], rate: float) -> None:
    """Prompts that can be in time fill the device for 8 s. A late one has its first token after a stated time."""
    requests = poisson(rate, 8.0, (500, 1500), (2, 4), seed=1)
    late = [SimulatedRequest(0.5, 12_000, 2)]  # 0.4 s: it gives way
    everything = sorted([*requests, *late], key=lambda request: request.arrival)
    config = make_config([InstanceRole(role) for role in roles], Sizes(), shares_prefixes=False)
    SimulatedSystem(config, steps(), Sizes().num_blocks, TTFT_MS, TPOT_MS).serve(everything)
    work_s = 0.0
    for request in late:
        assert request.ttft_ms > TTFT_MS
        work_s += steps().prompt_s(request.prompt_tokens, 0)
        assert request.ttft_ms / 1000 <= OVERDUE_TARGETS * TTFT_MS / 1000 + 1.1 * work_s / OVERDUE_SHARE
    in_time = sum(request.ttft_ms <= TTFT_MS for request in requests)
    assert in_time > 0.5 * len(requests)
