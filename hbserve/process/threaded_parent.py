"""A child process: orders go in as lines, its state comes out as lines, and its end is heard of."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from hbserve.process.child import environment as child_environment


class ManagedProcess:
    """One child, started by the constructor; see `hbserve.process.child` for its side.

    Its standard input is its life line: it ends when this process does, whatever ended that.

    Args:
        name: for messages.
        module: what it runs, as ``python -m``.
        orders: JSON-serialisable, its first line.
        environment: variables besides this process' own.
        on_status: called from a thread with each status that it reports.
        on_exit: called from that thread with its exit code, once, when it can touch nothing any more: it
            has ended, and so has everybody who has inherited its end of the status pipe.
    """

    def __init__(
        self,
        name: str,
        module: str,
        orders: dict[str, Any],
        environment: dict[str, str],
        on_status: Callable[[dict[str, Any]], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self.name = name
        self._on_status, self._on_exit = on_status, on_exit
        self._send_lock = threading.Lock()
        read_end, write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                env=child_environment(write_end) | environment,
                pass_fds=[write_end],
                start_new_session=True,  # Ctrl-C is for the launcher, which then ends its children in order
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self.send(orders)
        self._watcher = threading.Thread(target=self._watch, args=(read_end,), name=f"watch-{name}", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.returncode is None

    def send(self, order: dict[str, Any]) -> bool:
        """Write one line to it; False if it is gone."""
        assert self._process.stdin is not None
        try:
            with self._send_lock:
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def terminate(self) -> None:
        """Ask it to finish what is in flight and end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it, and what it has started in its process group, now.

        On a GPU this may take its neighbours with it: only for one that cannot be asked.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has ended and `on_exit` has returned; False if it has not in time."""
        if threading.current_thread() is not self._watcher:
            self._watcher.join(timeout)
        return not self._watcher.is_alive()

    def end(self, timeout_s: float) -> bool:
        """Ask, wait, and only then kill; False if that was needed."""
        self.terminate()
        asked = self.join(timeout_s)
        if not asked:
            self.kill()
            self.join(timeout_s)
        return asked

    def _watch(self, read_end: int) -> None:
        with os.fdopen(read_end, "rb") as pipe:
            for line in pipe:
                self._on_status(json.loads(line))
        code = self._process.wait()
        with self._send_lock, contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._on_exit(code)
