"""The scheduler's books without processes: lost memory, and workers that come to running sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.config import InstanceRole
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.messages.worker import Hello, InstanceCommand, StepPlan, StepResult
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.pd_disagg.instance_handle import InstanceHandle
from hbserve.pd_disagg.request_book import RequestBook
from hbserve.pd_disagg.scheduler_metrics import SchedulerMetrics
from hbserve.pd_disagg.sequence import Phase, Sequence
from hbserve.pd_disagg.step_planner import StepPlanner
from hbserve.pd_disagg.timeline import EventLog
from hbserve.pd_disagg.transfer_ledger import TransferLedger
from hbserve.pd_disagg.worker_handle import WorkerHandle

DEMO = Path(__file__).resolve().parent.parent / "examples" / "models" / "hbserve-demo"


class Books:
    """The scheduler's books of one instance, whose worker's part the test plays."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        config = PdDisaggConfig.from_arguments(str(DEMO), mode="unified", num_blocks=200, max_num_seqs=8).freeze()
        [instance_config] = config.gpu_instances
        self.instance = InstanceHandle(instance_config, config.performance, context, "inproc://nobody")
        [self.worker] = self.instance.workers.values()
        transfers = TransferLedger(False)
        metrics = SchedulerMetrics(SemiPDMetricsCollector(), config.scheduler, None)
        self.said: list[RequestOutput] = []
        self.book = RequestBook(
            config,
            {self.instance.id: self.instance},
            transfers,
            metrics,
            EventLog(),
            lambda client, output: self.said.append(output),
            lambda: None,
        )
        self.planner = StepPlanner(config, transfers, self.book.preempt, self.book.policy)
        self._epochs = itertools.count(1)
        self.begin()

    def begin(self) -> None:
        """The instance is there, with new memory."""
        self.arena_epoch = next(self._epochs)
        self.come(self.worker, self.arena_epoch)

    def come(self, worker: WorkerHandle, epoch: int) -> None:
        """A worker is there."""
        hello = Hello(
            instance_id=worker.id,
            role=worker.role,
            epoch=epoch,
            arena_epoch=self.arena_epoch,
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
        self.instance.register(worker, hello)

    def add(self, name: str) -> Sequence:
        request = AddRequest(
            request_id=name, prompt_token_ids=[1] * 20, end_token_ids=[], sampling=SamplingParams(max_tokens=500)
        )
        sequence = Sequence(b"c", request, len(self.book), [1] * 20, frozenset(), 520)
        self.book.add(sequence)
        return sequence

    def plan(self) -> bool:
        return self.planner.plan_step(self.instance, self.worker, {InstanceRole.PREFILL, InstanceRole.DECODE})

    def steps(self, number: int) -> None:
        for _ in range(number):
            assert self.plan()
            self.confirm(self.worker)

    def confirm(self, worker: WorkerHandle) -> None:
        """The worker has done its oldest step."""
        step = worker.inflight[0]
        tokens = [7 for row in step.rows if row.samples]
        result = StepResult(epoch=worker.epoch, step_id=step.step_id, token_ids=tokens, logprobs=None, busy_s=0.001)
        self.book.step_done(worker, result)

    def lose_memory(self) -> None:
        self.worker.inflight.clear()
        self.book.memory_lost(self.instance, "it burnt")
        self.begin()


@pytest.fixture
def books() -> Iterator[Books]:
    with zmq.Context() as context:
        books = Books(context)
        yield books
        books.worker.rpc.close()


async def test_requests_that_get_on_outlive_any_number_of_losses(books: Books) -> None:
    sequence = books.add("a")
    for _ in range(6):
        assert books.book.admit(sequence)
        books.steps(17)
        assert books.plan()  # one more step is in flight
        books.lose_memory()
        assert sequence.phase is Phase.WAITING
    assert len(sequence.tokens) == 20 + 6 * 17


async def test_a_request_at_which_the_memory_is_lost_again_and_again_fails(books: Books) -> None:
    poisonous, waiting = books.add("poisonous"), books.add("waiting")
    for _ in range(3):
        assert books.book.admit(poisonous)
        books.steps(1)  # its prefill goes well, and decoding does not
        assert books.plan()
        assert books.book.admit(waiting)  # it has a seat, and nothing in flight
        books.lose_memory()
    assert poisonous.phase is Phase.FINISHED
    assert waiting.phase is Phase.WAITING
    assert waiting.num_failures == 0
    assert [output.error for output in books.said if output.error] == ["gave up after 3 attempts; the last: it burnt"]


class NotedWorker(WorkerHandle):
    """One that notes what it is sent."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        super().__init__("late", InstanceRole.DECODE, 50, context, "inproc://nobody")
        self.plans: list[StepPlan] = []

    def send(self, command: InstanceCommand) -> None:
        assert isinstance(command, StepPlan)
        self.plans.append(command)


async def test_a_worker_that_comes_is_told_of_running_sequences_before_its_first_step(books: Books) -> None:
    running = [books.add(name) for name in "abc"]
    assert all(books.book.admit(sequence) for sequence in running)
    books.steps(3)
    waiting = books.add("waiting")
    assert books.book.admit(waiting)  # its prompt is not computed: whoever does that needs not be this worker
    with zmq.Context() as context:
        late = NotedWorker(context)
        books.instance.workers[late.id] = late
        books.come(late, epoch=77)
        books.planner.introduce(books.instance, late)
        books.steps(14)  # meanwhile they go on, and need another block
        assert books.planner.plan_step(books.instance, late, {InstanceRole.DECODE})
        for _ in range(2):
            books.confirm(late)
        late.rpc.close()
    introduction, first = late.plans
    blocks = {state.slot: list(state.block_ids) for state in introduction.new_sequences}
    slots = {sequence: seat.slot for sequence, seat in books.instance.seats.items()}
    assert introduction.rows == []
    assert set(blocks) == {slots[sequence] for sequence in running}
    assert [state.slot for state in first.new_sequences] == [slots[waiting]]
    for row in first.rows:
        assert row.token_ids == [7]
        blocks[row.slot] = blocks.get(row.slot, []) + row.new_block_ids
    for sequence in running:
        assert blocks[slots[sequence]] == list(books.instance.seats[sequence].block_ids)
