"""`EventQueue`: posted events are handled once each, in order, in the event loop thread; errors end the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

from hbserve.process import event_loop
from hbserve.worker.events import EventQueue

END = -1


class Recorder:
    """An event loop in a thread that notes the events it handles, until `END`."""

    def __init__(self) -> None:
        self.handled: list[Any] = []
        self.threads: set[int] = set()
        self.queue: EventQueue[Any] = EventQueue(self._on_event)

    def _on_event(self, event: Any) -> None:
        self.threads.add(threading.get_ident())
        if event == END:
            self.queue.end()
        elif callable(event):
            event()
        else:
            self.handled.append(event)

    def start(self) -> threading.Thread:
        return event_loop.start_thread(self.queue.loop, self.queue.serve)

    def run(self) -> None:
        thread = self.start()
        self.queue.post(END)
        thread.join(30)
        assert not thread.is_alive()


def test_events_of_one_thread_are_handled_in_their_order_in_the_thread_of_the_loop() -> None:
    recorder = Recorder()
    thread = recorder.start()
    for number in range(10_000):
        recorder.queue.post(number)
    recorder.queue.post(END)
    thread.join(30)
    assert recorder.handled == list(range(10_000))
    assert recorder.threads == {thread.ident}


def test_events_of_several_threads_are_handled_once_each_and_each_thread_s_in_order() -> None:
    recorder = Recorder()
    loop_thread = recorder.start()

    def post(poster: int) -> None:
        for number in range(5_000):
            recorder.queue.post((poster, number))

    posters = [threading.Thread(target=post, args=(poster,)) for poster in range(4)]
    for thread in posters:
        thread.start()
    for thread in posters:
        thread.join()
    recorder.queue.post(END)
    loop_thread.join(30)
    assert len(recorder.handled) == 20_000
    for poster in range(4):
        assert [number for other, number in recorder.handled if other == poster] == list(range(5_000))


def test_no_event_is_left_behind_by_a_loop_that_has_just_gone_to_sleep() -> None:
    """Each event is posted when the one before has been handled, so each one has to wake the loop again."""
    recorder = Recorder()
    thread = recorder.start()
    for _ in range(2_000):
        is_handled = threading.Event()
        recorder.queue.post(is_handled.set)
        assert is_handled.wait(30)
    recorder.queue.post(END)
    thread.join(30)


def test_events_that_are_posted_before_the_loop_runs_are_handled() -> None:
    recorder = Recorder()

    def post() -> None:
        for number in range(100):
            recorder.queue.post(number)

    poster = threading.Thread(target=post)
    poster.start()
    poster.join()
    assert recorder.handled == []
    recorder.run()
    assert recorder.handled == list(range(100))


def test_one_iteration_of_the_loop_handles_all_events_that_it_was_woken_for() -> None:
    recorder = Recorder()
    for number in range(100):
        recorder.queue.post(number)
    recorder.queue.loop.run_until_complete(asyncio.sleep(0))
    assert recorder.handled == list(range(100))
    recorder.queue.loop.close()


def test_an_event_of_the_loop_s_thread_comes_after_those_posted_before_and_is_handled_at_once() -> None:
    recorder = Recorder()

    async def work() -> None:
        recorder.queue.post(1)
        recorder.queue.post(2)
        assert recorder.handled == []
        recorder.queue.handle(3)
        assert recorder.handled == [1, 2, 3]

    recorder.queue.loop.run_until_complete(work())
    recorder.queue.loop.close()


def test_an_event_that_a_handler_adds_is_handled_when_the_handler_has_returned() -> None:
    recorder = Recorder()

    def add() -> None:
        recorder.queue.handle(2)
        recorder.handled.append(1)

    for event in (add, 3):
        recorder.queue.post(event)
    recorder.queue.loop.run_until_complete(asyncio.sleep(0))
    assert recorder.handled == [1, 3, 2]
    recorder.queue.loop.close()


def test_coroutines_end_with_the_queue() -> None:
    recorder, ends = Recorder(), []

    async def wait(name: str) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ends.append(name)

    async def return_early() -> None:
        ends.append("early")

    async def serve() -> None:
        await recorder.queue.serve(wait("a"), return_early(), wait("b"))
        ends.append("served")

    thread = event_loop.start_thread(recorder.queue.loop, serve)
    is_running = threading.Event()
    recorder.queue.loop.call_soon_threadsafe(lambda: recorder.queue.loop.call_later(0.01, is_running.set))
    assert is_running.wait(30)
    recorder.queue.post(END)
    thread.join(30)
    assert ends == ["early", "a", "b", "served"]


def run_program(body: str) -> subprocess.CompletedProcess[str]:
    program = f"""
import asyncio, sys, threading
from hbserve.process import event_loop
from hbserve.worker.events import EventQueue

def on_event(event):
    print(event, flush=True)
    if event == 2:
        raise ValueError("two is refused")

queue = EventQueue(on_event)
{body}
threading.Event().wait(30)
sys.exit(3)
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def assert_exits_with_error(body: str, printed: str) -> None:
    result = run_program(body)
    assert (result.returncode, result.stdout) == (1, printed)
    assert "the event loop failed; exiting" in result.stderr
    assert "ValueError: two is refused" in result.stderr


def test_an_error_in_a_handler_ends_the_process() -> None:
    body = "event_loop.start_thread(queue.loop, queue.serve)\nfor number in (1, 2): queue.post(number)"
    assert_exits_with_error(body, "1\n2\n")


def test_an_error_in_a_handler_before_the_loop_serves_ends_the_process() -> None:
    body = "for number in (1, 2): queue.post(number)\nevent_loop.start_thread(queue.loop, queue.serve)"
    assert_exits_with_error(body, "1\n2\n")


def test_an_error_in_a_coroutine_ends_the_process() -> None:
    body = (
        "async def fail(): raise ValueError('two is refused')\n"
        "event_loop.start_thread(queue.loop, lambda: queue.serve(fail()))"
    )
    assert_exits_with_error(body, "")


def test_an_error_in_an_event_that_a_coroutine_handles_ends_the_process() -> None:
    body = (
        "async def receive():\n    queue.handle(1)\n    queue.handle(2)\n    await asyncio.sleep(30)\n"
        "event_loop.start_thread(queue.loop, lambda: queue.serve(receive()))"
    )
    assert_exits_with_error(body, "1\n2\n")
