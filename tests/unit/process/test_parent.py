"""The parent's side of child processes, from event loops and from threads; and the restart budget."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hbserve.errors import StartupError
from hbserve.process import child as child_side
from hbserve.process import parent
from hbserve.process.parent import ChildProcess, RestartBudget

DEADLINE_S = 60.0


def new_child(orders: dict[str, Any], **callbacks: Any) -> ChildProcess:
    return ChildProcess("the child", "tests.support.obedient_child", orders, **callbacks)


async def test_a_child_is_started_stopped_and_started_again() -> None:
    child = new_child({"status": {"ready": True}})
    await child.stop()  # before a start there is nothing to do
    pids = set()
    for _ in range(2):
        child.start()
        await child.wait_ready(time.monotonic() + DEADLINE_S)
        assert child.is_alive()
        pids.add(child.pid)
        await child.stop()
        assert (child.exit_code, await child.wait(), child.is_alive()) == (7, 7, False)
        await child.stop()
    assert len(pids) == 2


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ({"status": {"error": "no memory"}}, "the child: no memory"),
        ({"exit_code": 3}, "the child ended at start with exit code 3"),
    ],
)
async def test_a_start_that_fails_says_why(orders: dict[str, Any], message: str) -> None:
    child = new_child(orders)
    child.start()
    with pytest.raises(StartupError, match=message):
        await child.wait_ready(time.monotonic() + DEADLINE_S)
    await child.stop()


async def test_a_late_start_is_an_error_and_a_cancelled_wait_leaves_the_child_alone() -> None:
    child = new_child({"status": {"neither": True}})
    child.start()
    with pytest.raises(StartupError, match="not ready in time"):
        await child.wait_ready(time.monotonic() + 0.2)
    waiting = asyncio.create_task(child.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL


async def test_a_child_that_does_not_end_logs_its_stacks_and_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parent, "_STOP_TIMEOUT_S", 0.2)
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    child = new_child({"status": {"ready": True}, "is_deaf": True})
    child.start()
    await child.wait_ready(time.monotonic() + DEADLINE_S)
    await child.stop()
    assert child.exit_code == -signal.SIGABRT
    assert "obedient_child.py" in capfd.readouterr().err


def test_children_log_at_the_level_of_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running child follows a new level, and one that is started later begins with it."""
    monkeypatch.setattr(child_side, "_new_level", None)
    root, before = logging.getLogger(), logging.getLogger().level
    reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
    orders = {"status": {"ready": True}, "echoes": True}
    children = [new_child(orders, on_status=lambda status: reports.put(status.get("level"))) for _ in range(2)]

    def level_of(child: ChildProcess) -> int:
        assert child.send({"asks_level": True})
        while (level := reports.get(timeout=DEADLINE_S)) is None:
            pass
        return int(level)

    try:
        children[0].start()
        assert level_of(children[0]) == logging.WARNING
        child_side.set_log_level("DEBUG")
        children[1].start()
        assert [level_of(child) for child in children] == [logging.DEBUG] * 2
        assert root.level == logging.DEBUG
    finally:
        child_side.set_log_level(logging.getLevelName(before))
        for child in children:
            child.kill()
            assert child.join(DEADLINE_S)


def test_threads_hear_every_status_and_then_the_exit() -> None:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    child = new_child(
        {"status": {"ready": True}, "echoes": True},
        environment={"OF_THE_CHILD": "1"},
        on_status=events.put,
        on_exit=events.put,
    )
    child.start()
    assert events.get(timeout=DEADLINE_S) == {"asleep": True}
    assert events.get(timeout=DEADLINE_S) == {"ready": True}
    assert child.send({"number": 1})
    assert events.get(timeout=DEADLINE_S) == {"echo": {"number": 1}}
    assert not child.join(0.01)
    assert not child.end(0.1)  # it reads on and does not look whether it should end: it is killed
    assert events.get(timeout=DEADLINE_S) == -signal.SIGKILL
    assert child.join(DEADLINE_S)
    assert not child.send({})
    child.kill()  # of an ended child: nothing happens


def test_a_child_may_share_the_group_and_inherit_descriptors() -> None:
    read_end, write_end = os.pipe()
    child = new_child({"status": {"ready": True}, "write_fd": write_end}, pass_fds=[write_end], has_own_group=False)
    child.start()
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        assert pipe.read(5) == b"hello"
    assert os.getpgid(child.pid) == os.getpgid(0)
    assert not child.wait_exit(0.01)
    child.kill()  # the child alone
    assert child.wait_exit(DEADLINE_S)
    assert child.exit_code == -signal.SIGKILL


def test_a_child_ends_with_its_parent_although_a_fork_of_the_parent_lives_on() -> None:
    code = """
import os, signal, time
from tests.unit.process.test_parent import DEADLINE_S, new_child
child = new_child({"status": {"ready": True}, "echoes": True})
child.start()
fork = os.fork()
if fork == 0:
    time.sleep(DEADLINE_S)
    os._exit(0)
print(child.pid, fork, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        pid, fork = map(int, running.stdout.readline().split())
        try:
            deadline = time.monotonic() + DEADLINE_S / 2
            while (state := Path(f"/proc/{pid}/stat")).exists() and ") Z " not in state.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.kill(fork, signal.SIGKILL)


def test_a_budget_allows_restarts_again_after_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("hbserve.process.parent.time.monotonic", lambda: now)
    budget = RestartBudget(3)
    delays = []
    for _ in range(3):
        assert budget.take()
        delays.append(budget.delay_s)
        now += 100.0
    assert delays == pytest.approx([0.1, 0.4, 1.6])
    assert not budget.take()
    now = 1000.0 + 601.0
    assert budget.take()
    assert not budget.take()
    assert not RestartBudget(0).take()
