"""What mode `auto` starts on one GPU serves no fewer requests than workers that were tuned by hand."""

from __future__ import annotations

from hbserve.bench.request_record import RequestTargets
from hbserve.policy.profile_file import profiled_predictor
from hbserve.simulate.config import Sizes
from hbserve.simulate.standard_loads import standard_load
from hbserve.simulate.systems import Setting, System, simulate

TUNED = ("unified@1024", "semi_pd@100-100")
SEEDS = (1, 2)
TOLERANCE = 0.02


def test_no_chunk_and_no_split_serves_more_than_steps_by_time() -> None:
    steps = profiled_predictor()
    sizes = Sizes(chunk_size=2048, max_chunk_prefill_tokens=2048)
    targets = RequestTargets(ttft_ms=400, tpot_ms=40)

    def attainment(name: str) -> float:
        setting = Setting(steps, steps, Sizes() if name == "unified" else sizes, targets)
        loads = [standard_load("code", 11.0, 100, seed) for seed in SEEDS]
        return sum(simulate(System.parse(name), setting, load).attainment for load in loads) / len(loads)

    best = max(map(attainment, TUNED))
    assert 0.9 < best < 1
    assert attainment("unified") >= best - TOLERANCE
