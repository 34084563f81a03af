"""What every child process of a launcher, or of a rank 0, does the same: take orders, report, die with its parent.

The launcher writes one JSON line to the child's standard input and keeps the pipe open as a life
line: when it closes, the parent is gone, whatever ended it. The child writes one JSON line about
its start to a status pipe: ready, or why not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from hbserve.config import LoggingConfig
from hbserve.errors import HBServeError
from hbserve.process import exit_core
from hbserve.process.log_format import JsonFormatter, TextFormatter

logger = logging.getLogger(__name__)

STATUS_FD_VARIABLE = "HBSERVE_STATUS_FD"
EXIT_DISMISSED = 69
"""Of an instance that the scheduler has let go: its launcher need not start it again."""


def environment(status_fd: int) -> dict[str, str]:
    """The environment of a child that inherits its end of the status pipe; for its parent."""
    values = dict(os.environ) | exit_core.environment()
    values[STATUS_FD_VARIABLE] = str(status_fd)
    # A user's own classes are imported from wherever the user's program imports.
    values["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # Threads of tensor operations that wait for each other shall sleep, not spin: on cores that other
    # processes want too, ours among them, whole time slices are spun away (measured: 0.3 s became 20 s).
    values.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return values


def set_process_title(title: str) -> None:
    """Show ``title`` in process lists."""
    import setproctitle

    setproctitle.setproctitle(title)


def configure_logging(config: LoggingConfig, who: str) -> None:
    """Log to standard error, each line with time, level and process; at SIGABRT the stack of every thread."""
    faulthandler.enable()
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(who) if config.format == "json" else TextFormatter(who))
    logging.basicConfig(level=config.level, handlers=[handler], force=True)
    # Libraries' chatter is for those who ask for DEBUG.
    if config.level != "DEBUG":
        for name in ("httpx", "asyncio", "transformers", "uvicorn.access", "uvicorn.error"):
            logging.getLogger(name).setLevel(logging.WARNING)


def read_orders() -> dict[str, Any]:
    """The launcher's JSON line; where it is gone already, the process ends."""
    exit_core.keep_off()
    line = sys.stdin.buffer.readline()
    if not line:
        exit_now(0)
    orders = json.loads(line)
    assert isinstance(orders, dict)
    return orders


def watch_parent(on_gone: Callable[[], object]) -> None:
    """Call ``on_gone`` from another thread once the life line is cut.

    The thread is a daemon: it blocks in a read that only the parent's end can finish.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        on_gone()

    threading.Thread(target=watch, name="life-line", daemon=True).start()


def watch_signals(on_signal: Callable[[], object]) -> None:
    """Call ``on_signal`` from another thread at every SIGTERM and SIGINT; from the main thread.

    A handler would run in the main thread, and only when that is back in Python: it may be waiting in C, for a
    lock or for a model to be loaded, and the kernel may have given the signal to another thread. The
    interpreter's own C handler, in whatever thread, writes to a pipe at once.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while os.read(read_end, 1):
            on_signal()

    threading.Thread(target=watch, name="signals", daemon=True).start()


def freeze_heap() -> None:
    """Have the collector of garbage leave out what is there now, since it lives as long as the process.

    A full collection looks at every object that is not frozen: where torch and transformers are imported that takes
    0.1 to 0.3 s, in which no step is launched and no token handed on.

    Only for processes that are ours from start to end: a program that embeds `DisaggregatedLLM` may want to have
    its own objects collected, and may call `gc.freeze` itself.
    """
    gc.freeze()


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads: links to peers that are gone may still block one in C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    exit_core.move_to()
    os._exit(code)


def exit_after(work: Callable[[], int]) -> NoReturn:
    """Do the work of this process, and end it with the code that is returned; an error of ours is reported, and 1."""
    code = 1
    try:
        code = work()
    except HBServeError as error:
        report_status({"error": str(error)})
        logger.error("%s", error)
    exit_now(code)


def report_status(status: dict[str, Any], is_last: bool = True) -> None:
    """Tell the launcher how the start went; does nothing where there is no launcher, or after the last word."""
    descriptor = os.environ.get(STATUS_FD_VARIABLE)
    if is_last:
        os.environ.pop(STATUS_FD_VARIABLE, None)
    if descriptor is not None:
        # A launcher that has given up, because another part failed first, no longer reads.
        with contextlib.suppress(ConnectionError), os.fdopen(int(descriptor), "w", closefd=is_last) as line:
            line.write(json.dumps(status) + "\n")
