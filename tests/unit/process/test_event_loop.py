"""Tasks that share a loop: long work of many leaves the loop to others after a bounded piece."""

from __future__ import annotations

import asyncio
import time

from hbserve.process.event_loop import SharedTurn

DEADLINE_S = 60.0
UNIT_S = 0.0005


async def test_long_tasks_together_do_a_bounded_piece_in_one_turn() -> None:
    """However many there are: 20 tasks do no more between two turns of another one than a task alone may."""
    shared, num_tasks, units_of_each = SharedTurn(), 20, 10
    done: list[int] = []
    done_by_turn: list[int] = []

    async def work(number: int) -> None:
        for _ in range(units_of_each):
            if shared.is_over:
                await shared.pass_on()
            until = time.monotonic() + UNIT_S
            while time.monotonic() < until:
                pass
            done.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(num_tasks)]
    async with asyncio.timeout(DEADLINE_S):
        while not all(task.done() for task in tasks):
            before = len(done)
            await asyncio.sleep(0)
            done_by_turn.append(len(done) - before)
    assert sorted(done) == sorted(list(range(num_tasks)) * units_of_each)
    # 3 ms are six units; the time of a turn may begin twice, for a task that was woken and for one that comes.
    assert max(done_by_turn) <= 14


async def test_a_task_that_is_cancelled_while_it_waits_holds_up_no_other() -> None:
    shared = SharedTurn()
    assert not shared.is_over
    waiting = [asyncio.create_task(shared.pass_on()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    async with asyncio.timeout(DEADLINE_S):
        results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, type(None), type(None)]
