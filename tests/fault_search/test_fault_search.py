"""Two thousand systems that break in all ways, and bugs that must be found; see the package's docstring."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fault_search.planted import FOUND_BY, PLANTED
from tests.fault_search.scenario import draw
from tests.fault_search.search import run, run_seeds, shrink
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

NUM_SEEDS = 2000
_CHUNK = 250


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, _CHUNK))
def test_nothing_goes_wrong_whatever_breaks(first: int) -> None:
    failures = run_seeds(first, first + _CHUNK)
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[name](monkeypatch)
    seeds = (FOUND_BY[name], *range(NUM_SEEDS))
    seed = next((seed for seed in seeds if run(draw(seed)) is not None), None)
    assert seed is not None, f"{NUM_SEEDS} seeds do not find it"
    print(f"found by seed {seed}")


@pytest.mark.parametrize("seed", [3192, 9777, 51567, 60480, 63781, 64175, 65336, 66635])
def test_a_seed_that_has_failed_once_does_not_fail_again(seed: int) -> None:
    failure = run(draw(seed))
    assert failure is None, str(failure)


_TRACE = """
from tests.fault_search.scenario import draw
from tests.fault_search.search import run
run(draw(5), print)
"""


def test_a_run_depends_on_its_seed_alone() -> None:
    """Neither on the process nor on its hashes; so a seed is enough to replay a failure."""
    lines: list[str] = []
    run(draw(5), lines.append)
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", _TRACE], env=environment, cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout.decode().splitlines() == "\n".join(lines).splitlines()


def test_a_failure_shrinks_to_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED["steps_do_not_pin"](monkeypatch)
    scenario = draw(FOUND_BY["steps_do_not_pin"])
    failure = run(scenario)
    assert failure is not None
    smaller = shrink(scenario, failure)
    found = run(smaller)
    assert found is not None
    assert found.place == failure.place
    assert len(smaller.requests) + len(smaller.faults) < len(scenario.requests) + len(scenario.faults)
