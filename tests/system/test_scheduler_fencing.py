"""A worker that hears several schedulers obeys one of them: the one that was started last, unless it is silent."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from hbserve.messages.worker import Hello, InstanceReply, Ping, Pong, StepPlan, StepResult, Superseded
from tests.support.model_zoo import save_model
from tests.support.paths import ROOT
from tests.support.ports import free_ports

DEADLINE_S = 60.0
HEARTBEAT_TIMEOUT_S = 1.0
YAML = """
mode: unified
model: {{path: {model}, device: cpu, dtype: float32}}
performance: {{num_blocks: 64}}
rpc: {{heartbeat_timeout_s: {timeout_s}}}
gpu_instances: [{{instance_id: unified-0, instance_type: unified, port: {port}, num_threads: 1}}]
"""


class Scheduler:
    """A scheduler's end of the line to a worker; a test says what it sends."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, epoch: int) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(InstanceReply)
        self.epoch = epoch

    def ping(self, known_epoch: int = 0) -> InstanceReply:
        """Send a ping and return the answer."""
        self._socket.send(msgspec.msgpack.encode(Ping(scheduler_epoch=self.epoch, known_epoch=known_epoch)))
        return self.receive()

    def send_step(self, epoch: int) -> None:
        """Send a plan without rows."""
        plan = StepPlan(epoch=epoch, step_id=1, rows=[], new_sequences=[], sends=[])
        self._socket.send(msgspec.msgpack.encode(plan))

    def receive(self) -> InstanceReply:
        """Wait for the next reply."""
        assert self._socket.poll(int(1000 * DEADLINE_S)), "no reply"
        reply: InstanceReply = self._decoder.decode(self._socket.recv())
        return reply

    def hears_nothing(self) -> bool:
        """Whether no reply comes for a moment."""
        return not self._socket.poll(200)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[str]:
    """The address of a worker that was started alone."""
    save_model(tmp_path / "model", "qwen3")
    [port] = free_ports(1)
    config = tmp_path / "system.yaml"
    config.write_text(YAML.format(model=tmp_path / "model", port=port, timeout_s=HEARTBEAT_TIMEOUT_S))
    script = ROOT / "scripts" / "start_pd_disagg.py"
    process = subprocess.Popen([sys.executable, script, "--config", config, "--instance-id", "unified-0"])
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_worker_obeys_the_newest_scheduler_only(worker: str) -> None:
    with zmq.Context() as context:
        context.linger = 0
        old, new = Scheduler(context, worker, 5), Scheduler(context, worker, 6)
        first = old.ping()
        assert isinstance(first, Hello)
        assert isinstance(old.ping(first.epoch), Pong)

        second = new.ping()
        assert isinstance(second, Hello)
        assert second.epoch > first.epoch

        # The old one goes on, because it only was cut off: it is told so, and its steps are not done.
        assert old.ping(first.epoch) == Superseded(scheduler_epoch=6)
        for epoch in (first.epoch, second.epoch):
            old.send_step(epoch)
        assert old.hears_nothing()
        assert isinstance(new.ping(second.epoch), Pong)  # and nothing has changed for the new one
        new.send_step(second.epoch)
        assert isinstance(new.receive(), StepResult)

        # The newer one is gone: a worker does not refuse the only scheduler that there is.
        time.sleep(HEARTBEAT_TIMEOUT_S)
        third = old.ping(first.epoch)
        assert isinstance(third, Hello)
        assert third.epoch > second.epoch
        old.send_step(third.epoch)
        assert isinstance(old.receive(), StepResult)
        for scheduler in (old, new):
            scheduler._socket.close()
