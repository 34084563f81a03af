"""A process that has imported torch and transformers once, and forks the children of the systems that tests start.

These imports cost 3 s of CPU, and tests start hundreds of workers. So `use` replaces ``subprocess.Popen`` in
`hbserve.process.parent`: a child is forked from the server, gets the environment, folder, descriptors and command line
that it would have been started with, and runs its module as ``__main__``. Children of children are forked too.
`program` is the command line of a Python program whose children are forked. Other programs that a test starts are
started as users start them, without this.

Client and server talk over one connection for each child: a JSON line with descriptors to the server; the process id,
and at the child's end its exit code, back.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import IO, Any

ADDRESS_VARIABLE = "HBSERVE_TEST_FORK_SERVER"
_MAX_REQUEST_BYTES = 1 << 20
_MAX_DESCRIPTORS = 16
_READ_AT_START = ("LD_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "GLIBC_", "TORCH_", "CUDA_", "PYTHON")
"""Variables that libraries read when they are loaded: a child that needs other values than the server is not forked."""
_READ_LATER = {"PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
_NEEDS_ITS_OWN = -1
"""The server's answer to a request for such a child, instead of a process id."""
_FIRST_FREE_DESCRIPTOR = 200
_RUN = "run"
_LIGHT_MODULES = ("hbserve.scheduler.process", "hbserve.frontend.text_worker", "hbserve.grammar_process.worker")
"""They do not import torch. They are forked too, once there is a server."""


# --- the client's side ---------------------------------------------------------------------------


class ForkedProcess:
    """Child of the fork server with the part of `subprocess.Popen` that `ChildProcess` uses."""

    def __init__(self, connection: socket.socket, pid: int, stdin: IO[bytes]) -> None:
        self.pid, self.stdin = pid, stdin
        self.returncode: int | None = None
        self._connection = connection
        self._lock = threading.Lock()

    def wait(self) -> int:
        with self._lock:
            if self.returncode is None:
                answer = _receive_exactly(self._connection, 4)
                self.returncode = struct.unpack("!i", answer)[0] if len(answer) == 4 else -signal.SIGKILL
                self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _popen(command: list[str], **options: Any) -> Any:
    if ForkServer.own is not None and command[2] not in _LIGHT_MODULES:
        ForkServer.own.start()
    address = os.environ.get(ADDRESS_VARIABLE)
    if address is None or command[:2] != [sys.executable, "-m"]:
        return subprocess.Popen(command, **options)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    read_end, write_end = os.pipe()
    targets = {0: read_end, 1: 1, 2: 2, **{fd: fd for fd in options["pass_fds"]}}
    request = {
        "module": command[2],
        "arguments": command[3:],
        "environment": options["env"],
        "folder": os.getcwd(),
        "targets": list(targets),
        "group": 0 if options["start_new_session"] else os.getpgrp(),
    }
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], list(targets.values()))
    os.close(read_end)
    answer = _receive_exactly(connection, 4)
    if len(answer) < 4:
        raise OSError("the fork server has ended")
    pid = struct.unpack("!i", answer)[0]
    if pid == _NEEDS_ITS_OWN:
        os.close(write_end)
        connection.close()
        return subprocess.Popen(command, **options)
    return ForkedProcess(connection, pid, os.fdopen(write_end, "wb"))


def _receive_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (part := connection.recv(num_bytes - len(data))):
        data += part
    return data


def program(*command: str | os.PathLike[str]) -> list[str]:
    """Return the command line of a program whose children are forked: ``program(path, ...)``, ``program("-m", ...)``.

    It must run with `environment`.
    """
    return [sys.executable, "-m", __name__, _RUN, *map(str, command)]


def environment() -> dict[str, str]:
    """Return the variables of a `program`."""
    assert ForkServer.own is not None
    ForkServer.own.start()
    return {ADDRESS_VARIABLE: os.environ[ADDRESS_VARIABLE], "PYTHONPATH": _python_path()}


def _python_path() -> str:
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def _run(command: list[str]) -> None:
    use()
    sys.argv = command[1:] if command[0] == "-m" else command
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")


def use() -> None:
    """Have this process' children forked by the server of `ADDRESS_VARIABLE`, if there is one."""
    from hbserve.process import parent

    parent.subprocess = types.SimpleNamespace(Popen=_popen, PIPE=subprocess.PIPE)  # type: ignore[attr-defined, assignment]


class ForkServer:
    """The server of this process' children. It starts with the first child that imports torch."""

    own: ForkServer | None = None

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        ForkServer.own = self
        use()

    def start(self) -> None:
        with self._lock:
            if self._process is None:
                self._start()

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="hbf-")
        address = f"{self._folder}/s"
        life_line, self._life_line = os.pipe()
        ready_end, write_end = os.pipe()
        command = [sys.executable, "-m", __name__, address, f"{life_line}", f"{write_end}"]
        self._process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": _python_path()}, pass_fds=[life_line, write_end]
        )
        os.close(life_line)
        os.close(write_end)
        with os.fdopen(ready_end, "rb") as ready:
            if ready.read(1) != b"r":
                raise RuntimeError("the fork server did not start")
        os.environ[ADDRESS_VARIABLE] = address

    def close(self) -> None:
        if self._process is not None:
            os.close(self._life_line)
            self._process.wait(30)
            shutil.rmtree(self._folder, ignore_errors=True)


# --- the server ----------------------------------------------------------------------------------


def _serve(address: str, life_line: int, ready_end: int) -> dict[str, Any]:
    """Fork children until the life line closes; returns, in each child, its request."""
    wake = socket.socketpair()
    for end in wake:
        end.setblocking(False)
    signal.set_wakeup_fd(wake[1].fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests' process ends this one
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    for source in (life_line, wake[0], listener):
        selector.register(source, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    os.write(ready_end, b"r")
    os.close(ready_end)
    while True:
        for key, _ in selector.select():
            if key.fileobj == life_line:
                os._exit(0)
            elif key.fileobj is wake[0]:
                with contextlib.suppress(BlockingIOError):
                    wake[0].recv(4096)
                _reap(children)
            else:
                connection, _ = listener.accept()
                request = _fork(connection, children)
                if request is not None:
                    selector.close()
                    # Objects that are deleted later must not close descriptors of the child that have their numbers.
                    for end in (*wake, listener, connection, *children.values()):
                        end.detach()
                    _take_descriptors(request["targets"], request["descriptors"])
                    return request


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with children.pop(pid) as connection, contextlib.suppress(OSError):
            connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))


def _fork(connection: socket.socket, children: dict[int, socket.socket]) -> dict[str, Any] | None:
    """Fork one child; returns its request in the child, and None in the server."""
    data, descriptors = b"", array.array("i")
    while not data.endswith(b"\n"):
        part, new, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, _MAX_DESCRIPTORS)
        descriptors.extend(new)
        if not part:
            connection.close()
            return None
        data += part
    request: dict[str, Any] = json.loads(data)
    is_possible = _can_join(request["group"]) and not _needs_its_own_libraries(request["environment"])
    pid = os.fork() if is_possible else _NEEDS_ITS_OWN
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(struct.pack("!i", pid))
        if pid == _NEEDS_ITS_OWN:
            connection.close()
        else:
            children[pid] = connection
        return None
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
    return request | {"descriptors": list(descriptors)}


def _can_join(group: int) -> bool:
    """Whether a process of this session may become one of the group; 0: a new group."""
    with contextlib.suppress(ProcessLookupError):
        return not group or os.getsid(group) == os.getsid(0)
    return False


def _needs_its_own_libraries(environment: dict[str, str]) -> bool:
    names = {name for name in (*environment, *os.environ) if name.startswith(_READ_AT_START)} - _READ_LATER
    return any(environment.get(name) != os.environ.get(name) for name in names)


def _take_descriptors(targets: list[int], descriptors: list[int]) -> None:
    """Give the child the descriptors that it was passed, under the numbers that it knows, and no others."""
    import fcntl

    first_free = max(_FIRST_FREE_DESCRIPTOR, *(target + 1 for target in targets))
    safe = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, first_free) for descriptor in descriptors]
    os.closerange(3, min(safe))
    for target, descriptor in zip(targets, safe, strict=True):
        os.dup2(descriptor, target)
    os.closerange(min(safe), max(safe) + 1)


def _become(request: dict[str, Any]) -> None:
    os.setpgid(0, request["group"])  # in the server's session, so that a child's child can join the child's group
    os.chdir(request["folder"])
    for name in set(os.environ) - set(request["environment"]):
        del os.environ[name]
    os.environ.update(request["environment"])
    paths = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = ["", *(path for path in paths if path), *(path for path in sys.path if path and path not in paths)]
    sys.argv = [request["module"], *request["arguments"]]
    # The streams of this interpreter are those of the server; the child's are other files under the same numbers.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=buffering, closefd=False)  # noqa: SIM115
        for number, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )


def _main() -> None:
    if sys.argv[1] == _RUN:
        _run(sys.argv[2:])
        return
    import setproctitle

    from hbserve.cache_folder.transformers_import import leave_out_torch

    leave_out_torch()
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import hbserve.engine.model_runner
    import hbserve.frontend.text_worker
    import hbserve.grammar_process.worker
    import hbserve.kv_transfer.two_sided.torch_link
    import hbserve.scheduler.process
    import hbserve.worker.process
    import hbserve.worker.rank_process
    import hbserve.worker.worker_process  # noqa: F401
    from hbserve.model_spec import supported_architectures

    for model_type in supported_architectures():
        CONFIG_MAPPING[model_type]
    setproctitle.getproctitle()  # finds the place of the title while the environment is as it was
    use()
    request = _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    _become(request)
    sys.modules.pop(request["module"], None)
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
