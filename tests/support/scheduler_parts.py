"""The scheduler's parts without its process: a test plays the workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.config import InstanceRole
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.messages.transfer import LinkOpened, Peer, TransferResult
from hbserve.messages.worker import Hello, StepResult
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.request_lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Sequence
from hbserve.scheduler.step_planner import StepPlanner
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"


class SchedulerParts:
    """Requests, plans and transfers of the instances of a mode; each instance has one worker.

    Attributes:
        outputs: all that clients were sent.
        instance, worker: the first instance and its worker.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], mode: str = "unified", **arguments: Any) -> None:
        self.context = context
        config = PdDisaggConfig.from_arguments(
            str(DEMO), mode=mode, num_blocks=200, max_num_seqs=8, **arguments
        ).freeze()
        self.instances = {
            instance.instance_id: InstanceHandle(instance, config, context, f"inproc://none-{instance.instance_id}")
            for instance in config.gpu_instances
        }
        self.instance = next(iter(self.instances.values()))
        [self.worker] = self.instance.workers.values()
        self.transfers = TransferTracker(False)
        metrics = SchedulerMetrics(SemiPDMetricsCollector(), config.scheduler, None)
        self.outputs: list[RequestOutput] = []
        self.requests = RequestLifecycle(
            config,
            self.instances,
            self.transfers,
            metrics,
            EventLog(),
            lambda client, output: self.outputs.append(output),
            lambda: None,
        )
        self.planner = StepPlanner(config, self.transfers, self.requests.preempt, self.requests.policy)
        self._epochs = itertools.count(1)
        for instance in self.instances.values():
            self.begin(instance)
        self.transfers.connect(self.instances.values())
        for number, (source, target) in enumerate(self.transfers.connecting, 1):
            peers = [Peer(rank=1, epoch=1, endpoint="")]
            opened = LinkOpened(epoch=1, source_id=source, link_epoch=number, peers=peers)
            self.transfers.on_link_opened(self.instances[target], opened)

    def begin(self, instance: InstanceHandle) -> None:
        """An instance's worker registers with new memory."""
        [worker] = instance.workers.values()
        epoch = next(self._epochs)
        self.register(instance, worker, epoch, arena_epoch=epoch)

    def register(self, instance: InstanceHandle, worker: WorkerHandle, epoch: int, arena_epoch: int) -> None:
        hello = Hello(
            instance_id=worker.id,
            role=worker.role,
            epoch=epoch,
            arena_epoch=arena_epoch,
            pid=1,
            model="m",
            dtype="float32",
            num_blocks=200,
            block_size=16,
            block_bytes=16,
            num_layers=1,
            head_bytes=16,
            max_model_len=1000,
            vocab_size=1024,
            device="cpu",
            peers=[],
        )
        instance.register(worker, hello)

    def add(self, name: str, max_tokens: int = 500) -> Sequence:
        request = AddRequest(
            request_id=name, prompt_token_ids=[1] * 20, end_token_ids=[], sampling=SamplingParams(max_tokens=max_tokens)
        )
        return self.add_request(request)

    def add_request(self, request: AddRequest) -> Sequence:
        sequence = Sequence.of_request(b"c", request, len(self.requests), max_model_len=1000)
        self.requests.add(sequence)
        return sequence

    def plan(self) -> bool:
        """Plan a step of both phases at the first worker."""
        return self.planner.plan_step(self.instance, self.worker, {InstanceRole.PREFILL, InstanceRole.DECODE})

    def decode(self, worker: WorkerHandle) -> bool:
        return self.planner.plan_step(self.instance, worker, {InstanceRole.DECODE})

    def steps(self, number: int) -> None:
        """Plan and confirm steps at the first worker."""
        for _ in range(number):
            assert self.plan()
            self.confirm(self.worker)

    def confirm(self, worker: WorkerHandle) -> None:
        """A worker has done its oldest step."""
        self.requests.on_step_done(worker, self.result(worker, 0))

    def result(self, worker: WorkerHandle, number: int) -> StepResult:
        """Return the result of one of a worker's steps in flight."""
        step = worker.inflight[number]
        tokens = [7 for row in step.rows if row.samples]
        return StepResult(epoch=worker.epoch, step_id=step.step_id, token_ids=tokens, logprobs=None, busy_s=0.001)

    def end_transfers(self, sequence: Sequence, error: str | None = None) -> None:
        """Both sides of a request's open transfers report their end."""
        for transfer_id in list(sequence.open_transfers):
            for sent in (True, False):
                result = TransferResult(
                    epoch=1, transfer_id=transfer_id, sent=sent, num_bytes=1, seconds=0.1, error=error
                )
                self.requests.on_transfer_ended(result)

    def lose_memory(self, instance: InstanceHandle) -> None:
        """An instance's worker is lost, and another one registers."""
        for worker in instance.workers.values():
            worker.drop_steps()
        self.requests.on_memory_lost(instance, "it burnt")
        self.begin(instance)


@contextmanager
def scheduler_parts(mode: str = "unified", **arguments: Any) -> Iterator[SchedulerParts]:
    """Parts whose connections, which lead nowhere, are closed at the end."""
    with zmq.Context() as context:
        parts = SchedulerParts(context, mode, **arguments)
        workers = [worker for instance in parts.instances.values() for worker in instance.workers.values()]
        yield parts
        for worker in workers:
            worker.rpc.close()
