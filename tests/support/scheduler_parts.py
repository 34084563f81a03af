"""The scheduler's parts without its process: a test plays the workers."""

from __future__ import annotations

import itertools
from typing import Any

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.config import InstanceRole
from hbserve.messages.client import AddRequest, OutputBatch, RequestOutput
from hbserve.messages.transfer import CloseLink, LinkClosed, LinkOpened, OpenLink, Peer, TransferResult
from hbserve.messages.worker import InstanceCommand, StepPlan, StepResult
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.scheduler.core_io import Clock, OutboxWriter, Start
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.requests.lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Sequence
from hbserve.scheduler.steps.step_planner import StepPlanner
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle
from tests.support.hellos import hello
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"


class SchedulerParts:
    """Requests, plans and transfers of the instances of a mode; each instance has one worker.

    Attributes:
        clock: its ``now`` is the time, which stands still unless a test changes it.
        instance, worker: the first instance and its worker.
    """

    def __init__(self, mode: str = "unified", **arguments: Any) -> None:
        self.clock = clock = Clock(Start(now=100.0, time_ns=0))
        self.outbox = outbox = OutboxWriter()
        config = PdDisaggConfig.from_arguments(
            str(DEMO), mode=mode, num_blocks=200, max_num_seqs=8, **arguments
        ).freeze()
        self.instances = Instances(
            InstanceHandle(instance, config, "nowhere", clock, outbox) for instance in config.gpu_instances
        )
        self.instance = next(iter(self.instances.values()))
        [self.worker] = self.instance.workers.values()
        self.transfers = TransferTracker(config.kv_transfer.verify)
        metrics = SchedulerMetrics(SemiPDMetricsCollector(clock=clock), config.scheduler, outbox)
        events = EventLog(clock, outbox)
        self.requests = RequestLifecycle(config, self.instances, self.transfers, metrics, events, clock, outbox)
        self.planner = StepPlanner(config, clock, self.transfers, self.requests.preempt, self.requests.policy, 0)
        self._outputs: list[RequestOutput] = []
        self._plans: list[tuple[int, StepPlan]] = []
        self._commands: list[tuple[int, InstanceCommand]] = []
        self._epochs = itertools.count(1)
        for instance in self.instances.values():
            self.begin(instance)
        self.transfers.connect(self.instances.values())
        self.open_links()

    def open_links(self) -> None:
        """All receivers that were asked to open a link report that it is ready."""
        for instance, command in self.commands():
            if isinstance(command, OpenLink):
                peers = [Peer(rank=1, epoch=1, endpoint="")]
                opened = LinkOpened(epoch=1, source_id=command.source_id, link_epoch=command.link_epoch, peers=peers)
                self.transfers.on_link_opened(instance, opened)

    def close_links(self) -> None:
        """All receivers that were asked to close a link report that nothing comes over it any more."""
        for instance, command in self.commands():
            if isinstance(command, CloseLink):
                closed = LinkClosed(epoch=1, source_id=command.source_id, link_epoch=command.link_epoch)
                self.transfers.on_link_closed(instance, closed)

    def commands(self) -> list[tuple[InstanceHandle, InstanceCommand]]:
        """What was sent to the instances' own workers since this was called last; not what `plans` returns."""
        self._read_outbox()
        commands, self._commands = self._commands, []
        by_connection = {
            w.connection: instance for instance in self.instances.values() for w in instance.workers.values()
        }
        return [(by_connection[to], command) for to, command in commands if to in by_connection]

    @property
    def outputs(self) -> list[RequestOutput]:
        """All that clients were sent."""
        self._read_outbox()
        return self._outputs

    def plans(self, worker: WorkerHandle) -> list[StepPlan]:
        """All plans that a worker was sent."""
        self._read_outbox()
        return [plan for connection, plan in self._plans if connection == worker.connection]

    def _read_outbox(self) -> None:
        outbox = self.outbox.take(0.0)
        for _, reply in outbox.to_clients:
            if isinstance(reply, OutputBatch):
                self._outputs += reply.outputs
        for to, command in outbox.to_workers:
            if isinstance(command, StepPlan):
                self._plans.append((to, command))
            else:
                self._commands.append((to, command))

    def begin(self, instance: InstanceHandle) -> None:
        """An instance's worker registers with new memory."""
        [worker] = instance.workers.values()
        epoch = next(self._epochs)
        self.register(instance, worker, epoch, arena_epoch=epoch)

    def register(self, instance: InstanceHandle, worker: WorkerHandle, epoch: int, arena_epoch: int) -> None:
        introduction = hello(worker.role, instance_id=worker.id, epoch=epoch, arena_epoch=arena_epoch)
        instance.register(worker, introduction)

    def add(self, name: str, max_tokens: int = 500) -> Sequence:
        request = AddRequest(
            request_id=name, prompt_token_ids=[1] * 20, end_token_ids=[], sampling=SamplingParams(max_tokens=max_tokens)
        )
        return self.add_request(request)

    def add_request(self, request: AddRequest) -> Sequence:
        sequence = Sequence.of_request(b"c", request, len(self.requests), max_model_len=1000, now=self.clock.now)
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
