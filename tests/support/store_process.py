"""``hbserve store`` as a process of a test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import ROOT

_DEADLINE_S = 60.0
_DEMO = ROOT / "examples" / "models" / "hbserve-demo"


class StoreProcess:
    """A running store.

    Attributes:
        settings: ``kv_cache.store`` for systems that use it.
    """

    def __init__(self, process: subprocess.Popen[str], port: int, num_bytes: int) -> None:
        self.process = process
        self.settings: dict[str, Any] = {"master": f"127.0.0.1:{port}", "bytes": num_bytes}
        self._num_bytes = num_bytes

    def pid_of(self, name: str) -> int | None:
        """Return the process id of ``mooncake_master`` or ``mooncake_client``; None: it does not run."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == name:
                    return int(child)
        return None

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a part."""
        pid = self.pid_of(name)
        assert pid is not None
        os.kill(pid, number)

    def wait_restarted(self, name: str, old_pid: int | None) -> None:
        """Wait until a part runs under another process id."""
        deadline = time.monotonic() + _DEADLINE_S
        while self.pid_of(name) in (None, old_pid):
            assert time.monotonic() < deadline, f"{name} was not started again"
            time.sleep(0.02)

    def flip_bytes(self) -> int:
        """Change a byte in every 512 that the store holds and that are not zero; returns how many."""
        begin, size = self._memory(), self._num_bytes
        changed = 0
        with open(f"/proc/{self.pid_of('mooncake_client')}/mem", "r+b", buffering=0) as memory:
            memory.seek(begin)
            data = memory.read(size)
            for place in range(0, size, 512):
                if data[place]:
                    memory.seek(begin + place)
                    memory.write(bytes([data[place] ^ 16]))
                    changed += 1
        return changed

    def _memory(self) -> int:
        """Return the address of the store's memory in its process, which is a multiple of its size."""
        from hbserve.kv_tiers.mooncake_library import load_library

        values = torch.ones(4096, dtype=torch.uint8)
        client = load_library().MooncakeDistributedStore()
        assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", self.settings["master"]) == 0
        try:
            assert client.register_buffer(values.data_ptr(), values.nbytes) == 0
            assert client.batch_put_from(["place"], [values.data_ptr()], [values.nbytes]) == [0]
            [replica] = client.get_replica_desc("place")
            address = int(replica.get_memory_descriptor().buffer_descriptor.buffer_address)
            return address - address % self._num_bytes
        finally:
            client.close()


@contextlib.contextmanager
def running_store(folder: Path, num_bytes: int = 16 << 20) -> Iterator[StoreProcess]:
    """Run a store; at the end it must end cleanly at SIGTERM, with all of its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = folder / "store.yaml"
    store = f"{{master: '127.0.0.1:{port}', bytes: {num_bytes}}}"
    file.write_text(f"mode: unified\nmodel: {{path: '{_DEMO}', device: cpu}}\nkv_cache:\n  store: {store}\n")
    command = [sys.executable, "-m", "hbserve", "store", "--config", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"the store at 127.0.0.1:{port} is ready\n"
        store_process = StoreProcess(process, port, num_bytes)
        yield store_process
        pids = [store_process.pid_of(name) for name in ("mooncake_master", "mooncake_client")]
        process.terminate()
        assert process.wait(_DEADLINE_S) == 0
        assert not [pid for pid in pids if pid is not None and Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
        process.wait()
