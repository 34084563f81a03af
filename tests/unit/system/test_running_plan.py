"""The choice of another plan while a system serves: names, roles, hysteresis, and predictions for a real load."""

from __future__ import annotations

import msgspec
import pytest

from hbserve.config import InstanceRole
from hbserve.errors import InvalidRequestError
from hbserve.messages.admin import LoadEntry
from hbserve.messages.prediction import CandidatePrediction, PredictionOrders
from hbserve.policy.profile_file import load_profile
from hbserve.simulate.prediction import predict
from hbserve.system.auto_plan import PREDICTION_ERRORS
from hbserve.system.running_plan import LoadSummary, choose_again, name_of, roles_of

U, P, D = InstanceRole.UNIFIED, InstanceRole.PREFILL, InstanceRole.DECODE


def test_a_system_has_one_name_and_as_few_instances_change_as_possible() -> None:
    for roles, name in (([U, U], "unified*2"), ([P, D, D], "1p2d"), ([U, D], None), ([D, D], None), ([], None)):
        assert name_of(roles) == name
    assert roles_of("1p1d", {"a": U, "b": U}) == {"a": P, "b": D}
    assert roles_of("2p1d", {"a": D, "b": P, "c": D}) == {"b": P, "a": P, "c": D}
    assert roles_of("unified*2", {"a": P, "b": D}) == {"a": U, "b": U}
    assert list(roles_of("1p2d", {"a": D, "b": D, "c": U}).values()) == [P, D, D], "prefill changes first"
    for system in ("unified*3", "2p2d", "unified", "0p2d", "1p1d*2"):
        with pytest.raises(InvalidRequestError, match=r"unified\*2 or 1p1d"):
            roles_of(system, {"a": U, "b": U})


def test_a_change_must_gain_more_than_the_worse_prediction_is_off() -> None:
    error = 100 * PREDICTION_ERRORS["disaggregated"] + 3

    def decide(current: str, is_measured: bool = True, **means: float) -> str:
        names = {name.replace("_x", "*").removeprefix("s"): mean / 100 for name, mean in means.items()}
        found = [CandidatePrediction(system=s, attainment={"recent": m}, bound={}) for s, m in names.items()]
        return choose_again(found, current, is_measured)[0]

    assert decide("unified*2", unified_x2=50, s1p1d=50 + error - 1) == "unified*2"
    assert decide("unified*2", unified_x2=50, s1p1d=50 + error + 1) == "1p1d"
    assert decide("1p1d", unified_x2=50 + error - 1, s1p1d=50) == "1p1d", "it is the present system that is uncertain"
    assert decide("1p1d", unified_x2=50 + error + 1, s1p1d=50) == "unified*2"
    assert decide("1p1d") == "1p1d"
    assert decide("unified*2", is_measured=False, unified_x2=10, s1p1d=99) == "unified*2"


def test_only_a_changed_load_is_judged_again() -> None:
    load = [LoadEntry(0.1 * number, 1000, 200, 50) for number in range(100)]
    summary = LoadSummary.of(load)
    assert summary.rate == pytest.approx(10.0)
    assert summary.is_like(LoadSummary.of(load[:60]))
    longer = [msgspec.structs.replace(entry, output_tokens=90) for entry in load]
    assert not summary.is_like(LoadSummary.of(longer))
    few_cached = [msgspec.structs.replace(entry, cached_tokens=3) for entry in load]
    fewer_cached = [msgspec.structs.replace(entry, cached_tokens=1) for entry in load]
    assert LoadSummary.of(few_cached).is_like(LoadSummary.of(fewer_cached))


@pytest.mark.parametrize("targets_are_soft", [False, True])
def test_the_simulator_predicts_for_the_load_that_there_was(targets_are_soft: bool) -> None:
    orders = PredictionOrders(
        profile=msgspec.to_builtins(load_profile(None)),
        candidates=["unified*2", "1p1d"],
        num_requests=1,
        ttft_ms=90.0,
        ttft_ms_per_1k_tokens=220.0,
        tpot_ms=43.0,
        max_num_seqs=256,
        load=[LoadEntry(0.2 * number, 1500, 1024 * (number % 2), 4) for number in range(20)],
        targets_are_soft=targets_are_soft,
    )
    for found in predict(orders):
        assert set(found.attainment) == {"recent"}
        assert 0.5 < found.attainment["recent"] <= found.bound["recent"]
    # Each request has the target of its own length: a long prompt among short ones keeps its own, and not their mean's.
    lengths = [300, 300, 300, 6000] * 5
    load = [LoadEntry(2.0 * number, tokens, 0, 4) for number, tokens in enumerate(lengths)]
    for found in predict(msgspec.structs.replace(orders, load=load, ttft_ms=30.0, ttft_ms_per_1k_tokens=60.0)):
        assert found.attainment["recent"] == 1.0


def test_what_the_simulator_predicts_decides_the_change() -> None:
    """Prompts of 1,000 to 2,200 tokens, 24 a second: two replicas cannot keep 7 ms a token beside them, 1P1D can."""
    load = [LoadEntry(number / 24, 1000 + 40 * (number * 7 % 31), 0, 150) for number in range(150)]
    orders = PredictionOrders(
        profile=msgspec.to_builtins(load_profile(None)),
        candidates=["unified*2", "1p1d"],
        num_requests=1,
        ttft_ms=500.0,
        ttft_ms_per_1k_tokens=0.0,
        tpot_ms=7.0,
        max_num_seqs=256,
        load=load,
    )
    loose = msgspec.structs.replace(orders, tpot_ms=43.0)
    assert choose_again(predict(orders), "unified*2", True)[0] == "1p1d"
    assert choose_again(predict(loose), "unified*2", True)[0] == "unified*2"
    faster = [msgspec.structs.replace(entry, arrival_s=entry.arrival_s / 2) for entry in load]
    assert choose_again(predict(msgspec.structs.replace(loose, load=faster)), "1p1d", True)[0] == "unified*2"
