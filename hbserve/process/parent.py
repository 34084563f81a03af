"""Parent's side of child processes: start, status lines, exit, end, and how often to restart.

A child has a watcher thread in its parent, which reads the child's status lines and waits for its exit. Methods can be
called from any thread; the coroutines (`wait_ready`, `wait`, `stop`) from any event loop.
`hbserve.process.child` is the child's side.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any

from hbserve.errors import StartupError
from hbserve.process import child
from hbserve.process.stopwatch import Start

logger = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 20.0
_ABORT_TIMEOUT_S = 5.0
_RESTART_WINDOW_S = 600.0


class ChildProcess:
    """One child process at a time; it may be started again after its exit.

    The child's standard input is its life line: the child ends when this process does, however this process ends.

    Args:
        name: name of the child in messages; may change.
        module: module that the child runs, as ``python -m``.
        orders: first line on the child's standard input, as JSON; may change between two starts.
        arguments: command line of the child.
        environment: variables besides those of this process.
        pass_fds: descriptors that the child inherits under the same numbers.
        has_own_group: False keeps the child in this process's group, so that one signal ends both.
        on_status: called in the watcher thread with each status that the child reports.
        on_exit: called in the watcher thread with the exit code, once per start, when the child can touch nothing any
            more: the child has ended, and so has every process that has inherited its end of the status pipe.
    """

    def __init__(
        self,
        name: str,
        module: str,
        orders: dict[str, Any],
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        has_own_group: bool = True,
        on_status: Callable[[dict[str, Any]], object] = lambda _: None,
        on_exit: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.name = name
        self._command = [sys.executable, "-m", module, *arguments]
        self.orders, self._environment = orders, dict(environment or {})
        self._pass_fds, self._has_own_group = pass_fds, has_own_group
        self._on_status, self._on_exit = on_status, on_exit
        self._send_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._latest_start: Start | None = None

    def start(self) -> None:
        """Start the process; it becomes ready later.

        Raises:
            OSError: if the system refuses another process.
        """
        began = time.monotonic()
        read_end, write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                env=child.environment(write_end) | self._environment,
                pass_fds=[write_end, *self._pass_fds],
                # A group of its own keeps Ctrl-C from the child: the launcher ends its children in order.
                start_new_session=self._has_own_group,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._began = began
        self._started: Future[dict[str, Any]] = Future()  # first status that tells how the start went; {}: none
        self._exited: Future[int] = Future()
        for future in (self._started, self._exited):
            future.set_running_or_notify_cancel()  # a coroutine that is cancelled must not cancel it
        _started.add(self)
        self.send(self.orders)
        child.add_follower(self)
        self._watcher = threading.Thread(target=self._watch, args=(read_end,), name=f"watch-{self.name}", daemon=True)
        self._watcher.start()

    def let_go(self) -> None:
        """Give up the life line, in a fork of this process: the child must end with this process, not with its fork."""
        assert self._process is not None
        if self._process.stdin is not None and not self._process.stdin.closed:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._process.stdin.fileno(), inheritable=False)
            os.close(nothing)

    @property
    def latest_start(self) -> Start | None:
        """The start that has ended last with a process that was ready; None before the first."""
        return self._latest_start

    @property
    def has_started(self) -> bool:
        """Whether the process was started: before that it has no id. It may have ended since."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code, or None before the start and while the process runs."""
        return None if self._process is None else self._process.returncode

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    def is_ready(self) -> bool:
        """Whether the process runs, and has reported that it is ready."""
        return self.is_alive() and self._started.done() and "ready" in self._started.result()

    def send(self, order: dict[str, Any]) -> bool:
        """Write one line to the child; False if the child has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            with self._send_lock:
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def has_unread(self) -> bool:
        """Whether bytes lie in the life line that the child has not read. A child that watches it reads at once."""
        process = self._process
        with self._send_lock:
            if process is None or process.stdin is None or process.stdin.closed:
                return False
            count = array.array("i", [0])
            fcntl.ioctl(process.stdin.fileno(), termios.FIONREAD, count)
            return count[0] > 0

    def terminate(self) -> None:
        """Ask the child to finish what is in flight and to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the child now, and the other processes of its own group.

        On a GPU this may end other processes of the device too: only for a child that does not answer.
        """
        if self._process is not None and not self._exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL) if self._has_own_group else self._process.kill()

    def wait_exit(self, timeout_s: float) -> bool:
        """Wait until the child has ended, but not for ``on_exit``; False if that takes longer. Any thread may wait."""
        return self._process is None or bool(futures.wait([self._exited], timeout_s).done)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the child has ended and ``on_exit`` has returned; False if that takes longer."""
        if threading.current_thread() is not self._watcher:
            self._watcher.join(timeout_s)
        return not self._watcher.is_alive()

    def end(self, timeout_s: float) -> bool:
        """Ask the child to end, wait, and kill it at the deadline; False if that was necessary."""
        self.terminate()
        has_ended = self.join(timeout_s)
        if not has_ended:
            self.kill()
            self.join(timeout_s)
        return has_ended

    async def wait_ready(self, deadline: float) -> None:
        """Wait until the child reports that it is ready.

        Args:
            deadline: on the monotonic clock.

        Raises:
            StartupError: with the child's own reason, with its exit code, or at the deadline.
        """
        try:
            status = await asyncio.wait_for(asyncio.wrap_future(self._started), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise StartupError(f"{self.name} was not ready in time (rpc.start_timeout_s)") from None
        if "error" in status:
            raise StartupError(f"{self.name}: {status['error']}")
        if "ready" not in status:
            raise StartupError(f"{self.name} ended at start with exit code {await self.wait()}; see its log")

    async def wait(self) -> int:
        """Wait until the child has ended, as ``on_exit`` means it; returns the exit code."""
        return await asyncio.wrap_future(self._exited)

    async def stop(self) -> None:
        """Ask the child to end, wait, and only then kill it; before that it logs the stack of each thread."""
        if self._process is None:
            return
        for end, timeout_s in ((self.terminate, _STOP_TIMEOUT_S), (self._abort, _ABORT_TIMEOUT_S), (self.kill, None)):
            end()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), timeout_s)
                return

    def _abort(self) -> None:
        logger.error("%s did not end within %g s; killing it", self.name, _STOP_TIMEOUT_S)
        self._signal(signal.SIGABRT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _watch(self, read_end: int) -> None:
        process, started, exited, began = self._process, self._started, self._exited, self._began
        assert process is not None
        assert process.stdin is not None
        with os.fdopen(read_end, "rb") as pipe:
            for line in pipe:
                if not line.endswith(b"\n"):
                    break  # the child was killed while it wrote
                status = json.loads(line)
                if ("ready" in status or "error" in status) and not started.done():
                    if "ready" in status:
                        parts = status.get("start_s", {})
                        self._latest_start = Start(self.name, began, time.monotonic(), parts)
                    started.set_result(status)
                self._on_status(status)
        code = process.wait()
        with self._send_lock, contextlib.suppress(OSError):
            process.stdin.close()
        if not started.done():
            started.set_result({})
        exited.set_result(code)
        self._on_exit(code)


_started: weakref.WeakSet[ChildProcess] = weakref.WeakSet()


def _let_go_of_all() -> None:
    for process in list(_started):
        process.let_go()


os.register_at_fork(after_in_child=_let_go_of_all)


class RestartBudget:
    """Restarts that are still allowed: at most ``max_restarts`` within ten minutes. Not thread-safe."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._times: deque[float] = deque()

    def take(self) -> bool:
        """Count one restart; False if the budget is spent."""
        now = time.monotonic()
        while self._times and now - self._times[0] > _RESTART_WINDOW_S:
            self._times.popleft()
        is_allowed = len(self._times) < self._max_restarts
        if is_allowed:
            self._times.append(now)
        return is_allowed

    def clear(self) -> None:
        """Forget the restarts so far, because their cause is gone."""
        self._times.clear()

    @property
    def delay_s(self) -> float:
        """Pause before the restart that was taken last: short at first, longer while the process keeps failing."""
        return min(0.1 * 4.0 ** (len(self._times) - 1), 10.0)
