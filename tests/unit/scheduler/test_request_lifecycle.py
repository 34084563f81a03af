"""The scheduler's books without processes: lost memory, workers that come to running sequences, and that take turns."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import msgspec
import pytest
import torch
import zmq

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.config import InstanceRole
from hbserve.engine.step_board import StepBoard
from hbserve.messages.client import AddRequest, RequestOutput
from hbserve.messages.worker import Hello, InstanceCommand, PlanRow, StepPlan, StepRef, StepResult
from hbserve.metrics.collector import SemiPDMetricsCollector
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.request_lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import Phase, Sequence
from hbserve.scheduler.step_planner import StepPlanner
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"


class Books:
    """The scheduler's books of one instance, whose worker's part the test plays."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.context = context
        config = PdDisaggConfig.from_arguments(str(DEMO), mode="unified", num_blocks=200, max_num_seqs=8).freeze()
        [instance_config] = config.gpu_instances
        self.instance = InstanceHandle(instance_config, config, context, "inproc://nobody")
        [self.worker] = self.instance.workers.values()
        transfers = TransferTracker(False)
        metrics = SchedulerMetrics(SemiPDMetricsCollector(), config.scheduler, None)
        self.said: list[RequestOutput] = []
        self.book = RequestLifecycle(
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

    def decode(self, worker: WorkerHandle) -> bool:
        return self.planner.plan_step(self.instance, worker, {InstanceRole.DECODE})

    def steps(self, number: int) -> None:
        for _ in range(number):
            assert self.plan()
            self.confirm(self.worker)

    def confirm(self, worker: WorkerHandle) -> None:
        """The worker has done its oldest step."""
        self.book.on_step_done(worker, self.result(worker, 0))

    def result(self, worker: WorkerHandle, number: int) -> StepResult:
        """Of one of its steps in flight."""
        step = worker.inflight[number]
        tokens = [7 for row in step.rows if row.samples]
        return StepResult(epoch=worker.epoch, step_id=step.step_id, token_ids=tokens, logprobs=None, busy_s=0.001)

    def lose_memory(self) -> None:
        self.worker.drop_steps()
        self.book.on_memory_lost(self.instance, "it burnt")
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
        assert books.book.admit(waiting)  # it has an allocation, and nothing in flight
        books.lose_memory()
    assert poisonous.phase is Phase.FINISHED
    assert waiting.phase is Phase.WAITING
    assert waiting.num_failures == 0
    assert [output.error for output in books.said if output.error] == ["gave up after 3 attempts; the last: it burnt"]


class NotedWorker(WorkerHandle):
    """One that notes what it is sent."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str = "late") -> None:
        super().__init__(name, InstanceRole.DECODE, 50, context, "inproc://nobody")
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
    slots = {sequence: allocation.slot for sequence, allocation in books.instance.allocations.items()}
    assert introduction.rows == []
    assert set(blocks) == {slots[sequence] for sequence in running}
    assert [state.slot for state in first.new_sequences] == [slots[waiting]]
    for row in first.rows:
        assert row.token_ids == [7]
        blocks[row.slot] = blocks.get(row.slot, []) + row.new_block_ids
    for sequence in running:
        assert blocks[slots[sequence]] == list(books.instance.allocations[sequence].block_ids)


@pytest.fixture
def pair(books: Books) -> Iterator[tuple[Books, NotedWorker, NotedWorker]]:
    """Two decode workers, of which one has a step of two sequences in flight, and the other the next one."""
    for name in "ab":
        assert books.book.admit(books.add(name))
    books.steps(3)
    with zmq.Context() as context:
        first, second = NotedWorker(context, "first"), NotedWorker(context, "second")
        for epoch, worker in enumerate((first, second), 77):
            books.instance.workers[worker.id] = worker
            books.come(worker, epoch)
            assert books.decode(worker)
        yield books, first, second
        first.rpc.close()
        second.rpc.close()


async def test_a_worker_has_its_plan_before_the_step_of_another_is_done(
    pair: tuple[Books, NotedWorker, NotedWorker],
) -> None:
    books, first, second = pair
    [ahead], [plan] = first.plans, second.plans
    assert (ahead.after, [row.token_ids for row in ahead.rows]) == (None, [[7], [7]])
    assert plan.after == StepRef(cell=ahead.cell, step_id=ahead.step_id)
    assert [(row.token_ids, row.sampled_elsewhere) for row in plan.rows] == [(None, True)] * 2
    assert books.decode(second)
    assert second.plans[1].after is None  # it has waited
    assert books.decode(first)
    assert first.plans[1].after == StepRef(cell=plan.cell, step_id=second.plans[1].step_id)
    # Results are taken in the order of the steps, in whichever they come.
    order = []
    second.results.extend(books.result(second, step) for step in range(2))
    assert books.instance.choice.next_to_confirm() is None
    first.results.extend(books.result(first, step) for step in range(2))
    while (worker := books.instance.choice.next_to_confirm()) is not None:
        order.append(worker.id)
        books.book.on_step_done(worker, worker.results.popleft())
    assert order == ["first", "second", "second", "first"]
    assert [len(sequence.tokens) for sequence in books.instance.allocations] == [20 + 3 + 4] * 2


async def test_a_retiring_worker_stays_until_who_comes_in_its_place_is_there(
    pair: tuple[Books, NotedWorker, NotedWorker],
) -> None:
    books, old, rung = pair
    assert books.book.admit(books.add("prompt"))  # both phases are busy
    old.percentage, rung.percentage = 40, 100
    old.is_draining = True
    new = NotedWorker(books.context, "new")
    books.instance.workers[new.id] = new

    def decodes() -> WorkerHandle:
        chosen = books.instance.choice.choose_workers()
        [worker] = [worker for worker, phases in chosen.items() if InstanceRole.DECODE in phases]
        return worker

    books.instance.choice.shares[InstanceRole.DECODE] = 50
    assert decodes() is old
    books.come(new, 79)
    assert decodes() is new
    new.rpc.close()


async def test_what_goes_on_from_a_lost_step_counts_for_nothing(pair: tuple[Books, NotedWorker, NotedWorker]) -> None:
    books, first, second = pair
    first.hello = None
    books.book.on_worker_lost(books.instance, first)
    assert not books.decode(second)  # the lost worker's process may still write
    books.book.on_steps_lost(books.instance.forget_worker(first))
    assert books.decode(second)  # both steps in one order, at one worker
    again = second.plans[1]
    assert [(row.start, row.token_ids) for row in again.rows] == [(row.start, [7]) for row in first.plans[0].rows]
    for _ in range(2):
        books.confirm(second)
    assert [len(sequence.tokens) for sequence in books.instance.allocations] == [20 + 3 + 1] * 2
    for sequence, allocation in books.instance.allocations.items():
        assert (allocation.num_inflight, allocation.num_planned, sequence.num_setbacks) == (
            0,
            len(sequence.tokens) - 1,
            0,
        )


async def test_a_lost_step_leaves_what_comes_before_it(pair: tuple[Books, NotedWorker, NotedWorker]) -> None:
    books, first, second = pair
    second.hello = None
    books.book.on_worker_lost(books.instance, second)
    books.book.on_steps_lost(books.instance.forget_worker(second))
    books.confirm(first)
    assert books.decode(first)
    assert [row.start for row in first.plans[1].rows] == [row.start + 1 for row in first.plans[0].rows]
    books.confirm(first)
    assert [len(sequence.tokens) for sequence in books.instance.allocations] == [20 + 3 + 2] * 2


def test_who_waits_on_the_board_goes_on_when_the_step_is_done_or_lost() -> None:
    memory = torch.zeros(StepBoard.num_bytes(4), dtype=torch.uint8)
    writer, reader = StepBoard(memory, 4, samples=True), StepBoard(memory, 4, samples=True)
    rows = [PlanRow(slot=2, start=9, num_tokens=1, token_ids=[1], new_block_ids=[], sample=True)]
    plan = StepPlan(epoch=1, step_id=50, rows=rows, new_sequences=[], sends=[], cell=3)
    following = [msgspec.structs.replace(rows[0], start=10, token_ids=None, sampled_elsewhere=True)]
    done = threading.Thread(target=reader.wait, args=[StepRef(cell=3, step_id=50)], daemon=True)
    done.start()
    entry = writer.entry(plan)
    assert entry is not None
    writer.note(entry, [123])
    done.join(20)
    assert not done.is_alive()
    assert [row.token_ids for row in reader.with_tokens(following)] == [[123]]
    with pytest.raises(AssertionError, match="no token for the position"):
        reader.with_tokens([msgspec.structs.replace(following[0], start=11)])
    lost = threading.Thread(target=reader.wait, args=[StepRef(cell=3, step_id=51)], daemon=True)
    lost.start()
    reader.note_lost(StepRef(cell=3, step_id=51))
    lost.join(20)
    assert not lost.is_alive()
    reader.end_waits_in(0.0)
    with pytest.raises(TimeoutError):
        reader.wait(StepRef(cell=3, step_id=52))
