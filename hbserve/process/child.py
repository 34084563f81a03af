"""Child's side of every process that this package starts: take orders, report, end with the parent.

The parent writes one JSON line of orders to the child's standard input and keeps the pipe open as a life line. Later
lines are further orders, for example another log level. When the pipe closes, the parent has ended, however it ended.
The child writes JSON lines to a status pipe; the one about its start says that it is ready, or why not.
`hbserve.process.parent` is the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, Protocol
from weakref import WeakSet

from hbserve.config import LoggingConfig
from hbserve.errors import HBServeError
from hbserve.process import exit_core
from hbserve.process.log_format import JsonFormatter, TextFormatter

logger = logging.getLogger(__name__)

_COLLECTION_INTERVAL_S = 10.0
_MAX_YOUNG_COLLECTIONS = 1000
"""Collections of young objects until a full one comes in any case: of about seven million objects that stay."""
_LOG_LEVEL = "log_level"
STATUS_FD_VARIABLE = "HBSERVE_STATUS_FD"
_SECRETS = frozenset(
    {"HBSERVE_API_KEY", "HBSERVE_API_KEYS", "HBSERVE_ADMIN_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"}
    | {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
)
"""Variables that no child needs: the API server alone checks keys, and the process that starts a system downloads."""
EXIT_DISMISSED = 69
"""Exit code of an instance that the scheduler has released: its launcher does not start it again."""
EXIT_SUPERSEDED = 73
"""Exit code of a scheduler whose workers obey a newer one: its launcher does not start it again."""


def environment(status_fd: int) -> dict[str, str]:
    """Return the environment for a child that inherits this end of the status pipe; called by the parent."""
    values = {name: value for name, value in os.environ.items() if name not in _SECRETS} | exit_core.environment()
    values[STATUS_FD_VARIABLE] = str(status_fd)
    # The child imports users' own classes from the same folders as the user's program.
    values["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # Threads of tensor operations that wait for each other must sleep, not spin. On cores that other processes need
    # too, spinning threads use up whole time slices (measured: 0.3 s became 20 s).
    values.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return values


def set_process_title(title: str) -> None:
    """Show ``title`` in process lists."""
    import setproctitle

    setproctitle.setproctitle(title)


class Follower(Protocol):
    """A child of this process."""

    def send(self, order: dict[str, Any]) -> bool:
        """Write an order to it."""


_input = bytearray()  # read from the life line, and not returned yet
_followers: WeakSet[Follower] = WeakSet()
_new_level: str | None = None
_logging = LoggingConfig(level="WARNING")  # of a program that embeds the engine, and does its own logging


def configure_logging(config: LoggingConfig, process_name: str) -> None:
    """Log to standard error, each line with time, level and process; at SIGABRT the stack of every thread."""
    global _logging
    _logging = config
    faulthandler.enable()
    handler = logging.StreamHandler()
    handler.setFormatter((JsonFormatter if config.format == "json" else TextFormatter)(process_name))
    logging.basicConfig(handlers=[handler], force=True)
    _apply_level(config.level if _new_level is None else _new_level)


def set_log_level(level: str) -> None:
    """Log at another level from now on, in this process and in all its children, also later ones."""
    global _new_level
    _new_level = level
    _apply_level(level)
    for follower in list(_followers):
        follower.send({_LOG_LEVEL: level})


def _apply_level(level: str) -> None:
    logging.getLogger().setLevel(level)
    # Only the level DEBUG shows the libraries' frequent messages.
    for name in ("httpx", "asyncio", "transformers", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.NOTSET if level == "DEBUG" else logging.WARNING)


def logging_config() -> LoggingConfig:
    """Return how this process logs, for a child that does not get the whole configuration."""
    return _logging


def add_follower(follower: Follower) -> None:
    """Have a child that has just started log at the level of this process; called by the parent."""
    _followers.add(follower)
    if _new_level is not None:
        follower.send({_LOG_LEVEL: _new_level})


def read_orders() -> dict[str, Any]:
    """Read the parent's line of orders; end this process if the parent has already ended.

    The parent decides when this process ends, so a SIGHUP to the whole process group does not end it.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    exit_core.keep_off()
    raise_descriptor_limit()
    orders = next_order()
    if orders is None:
        exit_now(0)
    return orders


def next_order() -> dict[str, Any] | None:
    """Wait for the parent's next order; None: the life line has closed. Log levels are obeyed here.

    One thread at a time may wait. It reads without Python's buffer, whose lock a daemon thread would keep at the exit.
    """
    while True:
        line, end, rest = _input.partition(b"\n")
        if end:
            _input[:] = rest
            order: dict[str, Any] = json.loads(line)
            if order.keys() != {_LOG_LEVEL}:
                return order
            set_log_level(order[_LOG_LEVEL])
        elif part := os.read(sys.stdin.fileno(), 1 << 16):
            _input.extend(part)
        else:
            return None


def watch_parent(on_parent_exit: Callable[[], object]) -> None:
    """Call ``on_parent_exit`` from another thread when the life line closes.

    The thread is a daemon: it blocks in a read that returns only when the parent ends.
    """

    def watch() -> None:
        while next_order() is not None:
            pass
        on_parent_exit()

    threading.Thread(target=watch, name="life-line", daemon=True).start()


def watch_signals(on_signal: Callable[[], object], on_hangup: Callable[[], object] | None = None) -> None:
    """Call ``on_signal`` from another thread at every SIGTERM and SIGINT; must be called from the main thread.

    Args:
        on_hangup: called in the same way at SIGHUP; None: SIGHUP stays as it is.

    A Python handler would run only when the main thread is back in Python. The main thread may be waiting in C, for a
    lock or for a model to be loaded. The interpreter's own C handler does not wait for it: in the thread that gets the
    signal, it writes to a pipe at once.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, *([] if on_hangup is None else [signal.SIGHUP])):
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while number := os.read(read_end, 1):
            if number[0] == signal.SIGHUP:
                (on_hangup or on_signal)()
            elif number[0] in (signal.SIGTERM, signal.SIGINT):
                on_signal()

    threading.Thread(target=watch, name="signals", daemon=True).start()


def raise_descriptor_limit() -> None:
    """Let this process, and its later children, have as many file descriptors as they may ask for.

    The usual soft limit, 1024, is for programs that use ``select``; each connection needs a descriptor.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def limit_memory(num_bytes: int) -> None:
    """Limit the memory that this process allocates from now on.

    Python then raises a MemoryError; a library may end the process.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        [used_kib] = [int(line.split()[1]) for line in file if line.startswith("VmData:")]
    limit, most = used_kib * 1024 + num_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def freeze_heap() -> None:
    """Exclude all present objects from garbage collection: they live as long as the process.

    A full collection visits every object that is not frozen. With torch and transformers imported, that takes
    0.1 to 0.3 s, in which the process launches no step and forwards no token.

    Only for processes that run nothing but this package. A program that embeds `DisaggregatedLLM` may need its own
    objects collected, and can call `gc.freeze` itself.
    """
    gc.freeze()


async def collect_when_quiet(is_quiet: Callable[[], bool]) -> None:
    """Do the full garbage collections of this process while its event loop has little to do, for ever.

    A collection stops all threads. A full one takes about 1 ms for 3,000 objects, and 30,000 open outputs have some
    300,000. Python would begin one whenever the number of objects has grown by a quarter, so amid the growth.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _MAX_YOUNG_COLLECTIONS)
    while True:
        await asyncio.sleep(_COLLECTION_INTERVAL_S)
        if any(gc.get_count()[1:]) and is_quiet():
            gc.collect()


def exit_now(code: int) -> NoReturn:
    """End the process without waiting for threads: a link to a lost peer may still block one in C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    exit_core.move_to()
    os._exit(code)


def exit_after(work: Callable[[], int]) -> NoReturn:
    """Do the work of this process and exit with the code that it returns, or with 1 after an error.

    The parent gets the text of an `HBServeError`; the log gets every error.
    """
    code = 1
    try:
        code = work()
    except HBServeError as error:
        report_status({"error": str(error)})
        logger.error("%s", error)
    except BaseException:
        logger.exception("the process failed")
    exit_now(code)


def report_status(status: dict[str, Any], is_last: bool = True) -> None:
    """Write one line to the parent's status pipe.

    Does nothing if there is no parent that reads, or after the last line.

    Args:
        is_last: close the pipe after this line.
    """
    descriptor = os.environ.get(STATUS_FD_VARIABLE)
    if is_last:
        os.environ.pop(STATUS_FD_VARIABLE, None)
    if descriptor is not None:
        # A launcher whose start failed at another process no longer reads.
        with contextlib.suppress(ConnectionError), os.fdopen(int(descriptor), "w", closefd=is_last) as line:
            line.write(json.dumps(status) + "\n")
