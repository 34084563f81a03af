"""The same events at the same times give the same outboxes, whatever the hashes of strings and objects are."""

from __future__ import annotations

import heapq
import itertools
import math
import os
import subprocess
import sys
from hashlib import sha256

import msgspec

from hbserve import SamplingParams
from hbserve.config import InstanceRole, from_dict
from hbserve.messages.client import AddRequest, Attach
from hbserve.messages.transfer import LinkOpened, OpenLink, Peer, ReceiveBlocks, TransferResult
from hbserve.messages.worker import Hello, InstanceCommand, InstanceReply, Ping, Pong, StepPlan, StepResult
from hbserve.scheduler.core_io import ConnectionBroke, FromClient, FromWorker, InboxEvent, Start
from hbserve.scheduler.scheduler import CpuScheduler
from tests.support.hellos import hello
from tests.support.paths import ROOT
from tests.support.scheduler_parts import DEMO

NUM_REQUESTS = 40
STEP_S = 0.004


class Worker:
    """A worker that answers at once, except that its steps take time one after the other."""

    def __init__(self, name: str, role: InstanceRole) -> None:
        self.name, self.role = name, role
        self.epoch = 1
        self.free_at = 0.0

    def answers(self, now: float, command: InstanceCommand) -> list[tuple[float, InstanceReply]]:
        if isinstance(command, Ping):
            is_known = command.known_epoch == self.epoch
            return [(now + 0.001, Pong(epoch=self.epoch) if is_known else self.hello())]
        if isinstance(command, OpenLink):
            peers = [Peer(rank=1, epoch=1, endpoint="there")]
            opened = LinkOpened(
                epoch=self.epoch, source_id=command.source_id, link_epoch=command.link_epoch, peers=peers
            )
            return [(now + 0.001, opened)]
        if isinstance(command, ReceiveBlocks):
            return [(now + 3 * STEP_S, self.transferred(command.transfer_id, sent=False))]
        if not isinstance(command, StepPlan) or command.epoch != self.epoch:
            return []
        self.free_at = max(self.free_at, now) + STEP_S
        result = StepResult(
            epoch=self.epoch,
            step_id=command.step_id,
            token_ids=[(row.start + row.num_tokens) % 50 for row in command.rows if row.sample],
            logprobs=None,
            busy_s=STEP_S,
        )
        sent = [(self.free_at + STEP_S, self.transferred(send.transfer_id, sent=True)) for send in command.sends]
        return [(self.free_at, result), *sent]

    def transferred(self, transfer_id: str, sent: bool) -> TransferResult:
        return TransferResult(epoch=self.epoch, transfer_id=transfer_id, sent=sent, num_bytes=1, seconds=0.1)

    def hello(self) -> Hello:
        return hello(
            self.role,
            instance_id=self.name,
            epoch=self.epoch,
            arena_epoch=self.epoch,
            num_blocks=24,
            max_model_len=300,
            vocab_size=50,
        )


def history() -> str:
    """Run a system of two prefill and two decode instances, one of which is lost; return a digest of all it said."""
    roles = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
    config = from_dict(
        {
            "model": {"path": str(DEMO), "device": "cpu"},
            "mode": "disaggregated",
            "performance": {"max_num_seqs": 8, "placement": "prefix_aware", "decode_headroom_tokens": 0},
            "scheduler": {"policy": "slo_aware", "ttft_ms": 100},
            "gpu_instances": [
                {"instance_id": name, "instance_type": role, "kv_rank": rank}
                for rank, (name, role) in enumerate(roles.items())
            ],
        }
    )
    scheduler = CpuScheduler(config, {name: name for name in roles}, Start(now=0.0, time_ns=1))
    workers = {name: Worker(name, InstanceRole(role)) for name, role in roles.items()}
    by_connection: dict[int, Worker] = {}
    numbers = itertools.count()
    events: list[tuple[float, int, InboxEvent]] = []

    def happens(at: float, event: InboxEvent) -> None:
        heapq.heappush(events, (at, next(numbers), event))

    for number in range(5):
        happens(0.0, FromClient(b"c%d" % number, Attach(client_id=f"client {number}")))
    for number in range(NUM_REQUESTS):
        prompt = [number % 7] * 16 + [(number * 11 + position) % 50 for position in range(number % 5 * 20)]
        sampling = SamplingParams(max_tokens=30 + number % 9, temperature=0)
        request = AddRequest(request_id=str(number), prompt_token_ids=prompt, end_token_ids=[49], sampling=sampling)
        happens(0.1 + number * 0.003, FromClient(b"c%d" % (number % 5), request))
    digest, num_ended, now, lost_at = sha256(), 0, 0.0, 0.25
    while num_ended < NUM_REQUESTS:
        inbox: list[InboxEvent] = []
        while events and events[0][0] <= now:
            inbox.append(heapq.heappop(events)[2])
        if now >= lost_at:
            lost_at = math.inf
            workers["decode-1"].epoch = 2
            inbox.append(ConnectionBroke(4))
        outbox = scheduler.step(now, inbox)
        digest.update(msgspec.msgpack.encode(outbox, enc_hook=repr))
        for connection, address in outbox.connects:
            by_connection[connection] = workers[address]
        for connection, command in outbox.to_workers:
            for at, reply in by_connection[connection].answers(now, command):
                happens(at, FromWorker(connection, reply))
        num_ended += len(outbox.ended)
        now = min(outbox.call_at, events[0][0] if events else math.inf, lost_at)
    counts = scheduler.counts
    assert (counts["completed"], counts["retries"] > 0, counts["preemptions"] > 0) == (NUM_REQUESTS, True, True), counts
    for instance in scheduler.instances.values():
        instance.pool.check_consistency()
    return digest.hexdigest()


def test_hashes_and_addresses_of_objects_change_nothing() -> None:
    program = "from tests.unit.scheduler.test_determinism import history; print(history())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert digests == {f"{history()}\n"}
