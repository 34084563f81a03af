"""Legal transitions of an instance and of a worker; all others are bugs."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from hbserve.messages.supervisor import WorkerSpec
from hbserve.semi_pd.instance_life import NEXT_LIFECYCLES, Lifecycle
from hbserve.semi_pd.utils import InstanceRole
from hbserve.semi_pd.worker_pool import Worker, WorkerState

INSTANCE = """
stopped -> starting
starting -> running
starting -> stopping
running -> stopping
stopping -> stopping
stopping -> stopped
"""
WORKER = """
preparing -> ready
preparing -> retiring
preparing -> ended
ready -> active
ready -> retiring
ready -> ended
active -> retiring
active -> ended
retiring -> retiring
retiring -> ended
"""


def test_the_transitions_of_an_instance() -> None:
    legal = [f"{state} -> {following}" for state in NEXT_LIFECYCLES for following in NEXT_LIFECYCLES[state]]
    assert sorted(legal) == sorted(INSTANCE.split("\n")[1:-1])
    assert set(NEXT_LIFECYCLES) == set(Lifecycle)


@pytest.mark.parametrize(("before", "after"), [*itertools.product(WorkerState, WorkerState)])
def test_a_worker_makes_legal_transitions_only(before: WorkerState, after: WorkerState) -> None:
    process: Any = SimpleNamespace(pid=1)
    worker = Worker(WorkerSpec(worker_id="w", role=InstanceRole.DECODE, percentage=60, address=""), process)
    worker.state = before
    if f"{before} -> {after}" in WORKER:
        worker.enter(after)
        assert worker.state is after
    else:
        with pytest.raises(AssertionError, match="->"):
            worker.enter(after)
