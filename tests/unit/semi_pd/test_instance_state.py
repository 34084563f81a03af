"""State of a semi-PD instance whose processes end at awkward moments."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hbserve.config import Config, from_dict
from hbserve.messages.supervisor import ReportEvent, SetWorkers
from hbserve.semi_pd.instance_life import Lifecycle
from hbserve.semi_pd.instance_state import InstanceState
from hbserve.slo.constraints import SMAllocation

DEADLINE_S = 60.0
_MODEL = Path(__file__).parents[3] / "examples/models/hbserve-demo"


def config(**rpc: Any) -> Config:
    return from_dict({"mode": "semi_pd", "model": {"path": str(_MODEL), "device": "cpu"}, "rpc": rpc})


def running_state(system: Config, run_dir: Path, sent: list[Any]) -> InstanceState:
    """State of an instance that runs, with a link that records; nothing is loaded."""
    state = InstanceState(system, system.gpu_instances[0], SMAllocation(50, 60))
    link: Any = SimpleNamespace(send=sent.append)
    state.link = link
    state.lifecycle = Lifecycle.RUNNING
    state._keep_first_standbys = lambda pool: None  # type: ignore[method-assign]
    state.start_workers(str(run_dir), {}, False)
    return state


def test_a_scheduler_that_ends_while_the_memory_is_loaded_again_finds_no_workers_yet(tmp_path: Path) -> None:
    """The thread of the link goes on: the recovery names the workers to the next scheduler when they are there."""
    sent: list[Any] = []
    state = running_state(config(), tmp_path, sent)
    state.on_scheduler_disconnected()
    [named] = sent
    assert isinstance(named, SetWorkers)
    assert (named.workers, named.arena_epoch) == ([], 0)
    with state.changed:
        state.replace_lost()  # a worker of the lost memory has ended now
    assert state.processes() == []


def test_a_standby_that_ends_is_an_event_and_is_replaced_but_not_for_ever(tmp_path: Path) -> None:
    sent: list[Any] = []
    state = running_state(config(max_restarts=1), tmp_path, sent)
    with state.changed:
        assert state.pool is not None
        state.pool.keep_standbys(1)

    def wait_for_events(number: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while len(sent) < number:
            assert time.monotonic() < deadline, sent
            time.sleep(0.01)

    [first] = state.processes()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    wait_for_events(1)
    with state.changed:
        second, third = state.processes()
    for process in (second, third):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    wait_for_events(5)
    assert all(isinstance(event, ReportEvent) and event.subject == "semi-0-standby" for event in sent)
    assert [event.kind for event in sent] == ["lost", "lost", "given_up", "lost", "given_up"]
    assert not any(process.is_alive() for process in state.processes())
