"""Lost memory, lost workers, and workers that join or take over running sequences; without processes."""

from __future__ import annotations

import threading
from typing import Any

import msgspec
import pytest
import torch

from hbserve.config import InstanceRole
from hbserve.engine.step_board import StepBoard
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import AddRequest, Resumed
from hbserve.messages.worker import NO_TOKEN, PlanRow, StepPlan, StepRef
from hbserve.sampling_params import SamplingParams
from hbserve.scheduler.sequence import Phase, Sequence
from hbserve.scheduler.worker import WorkerHandle
from tests.support.scheduler_parts import SchedulerParts


@pytest.fixture
def parts() -> SchedulerParts:
    return SchedulerParts()


@pytest.fixture
def chunked_parts() -> SchedulerParts:
    """Prompts are computed in chunks of 40 tokens."""
    return SchedulerParts(chunk_size=40)


def test_requests_that_make_progress_survive_any_number_of_losses(parts: SchedulerParts) -> None:
    sequence = parts.add("a")
    for _ in range(6):
        assert parts.requests.admit(sequence)
        parts.steps(17)
        assert parts.plan()  # one more step is in flight
        parts.lose_memory(parts.instance)
        assert sequence.phase is Phase.WAITING
    assert len(sequence.tokens) == 20 + 6 * 17


def test_a_request_that_loses_the_memory_repeatedly_fails(parts: SchedulerParts) -> None:
    poisonous, waiting = parts.add("poisonous"), parts.add("waiting")
    for _ in range(3):
        assert parts.requests.admit(poisonous)
        parts.steps(1)  # its prefill succeeds, its decode does not
        assert parts.plan()
        assert parts.requests.admit(waiting)  # it has an allocation and nothing in flight
        parts.lose_memory(parts.instance)
    assert poisonous.phase is Phase.FINISHED
    assert waiting.phase is Phase.WAITING
    assert waiting.num_failures == 0
    errors = [output.error for output in parts.outputs if output.error]
    assert errors == ["gave up after 3 attempts; the last: it burnt"]


def test_prompt_logprobs_are_sent_once_through_losses_and_preemption(chunked_parts: SchedulerParts) -> None:
    parts = chunked_parts

    def confirm() -> None:
        result = parts.result(parts.worker, 0)
        step = parts.worker.inflight[0]
        lists = [
            [
                TokenLogprobs(token=-float(position), top_ids=[], top=[])
                for position in range(row.start + 1, row.end + 1)
            ]
            for row in step.rows
            if row.scores
        ]
        for entries in lists:
            del entries[99 - round(-entries[0].token) + 1 :]  # the last position's next token is not in the prompt
        parts.requests.on_step_done(parts.worker, msgspec.structs.replace(result, prompt_logprobs=lists))

    prompt = [1] * 100
    sampling = SamplingParams(max_tokens=5, prompt_logprobs=0)
    request = AddRequest(request_id="a", prompt_token_ids=prompt, end_token_ids=[], sampling=sampling)
    cached = parts.add_request(msgspec.structs.replace(request, request_id="b", sampling=SamplingParams(max_tokens=1)))
    assert parts.requests.admit(cached)
    while cached.phase is not Phase.FINISHED:
        parts.steps(1)
    parts.outputs.clear()
    sequence = parts.add_request(request)
    cached_tokens = []
    for end in ("lost", "preempted", "preempted", None):
        assert parts.requests.admit(sequence)
        assert sequence.prefill_allocation is not None
        cached_tokens.append(sequence.prefill_allocation.num_planned)
        assert parts.plan()
        if end != "lost":
            confirm()
        if end == "lost":
            parts.lose_memory(parts.instance)
        elif end == "preempted":
            parts.requests.preempt(sequence)
    while sequence.phase is not Phase.FINISHED:
        assert parts.plan()
        confirm()
    assert cached_tokens == [0, 0, 32, 64]  # what the client has already need not be computed again
    values = [entry.token for output in parts.outputs for entry in output.prompt_logprobs or ()]
    assert values == [-float(position) for position in range(1, 100)]
    assert all(not output.prompt_logprobs for output in parts.outputs if output.token_ids)


def test_a_request_of_an_earlier_scheduler_goes_on_after_the_tokens_that_its_client_has(
    parts: SchedulerParts,
) -> None:
    waiting = parts.add("waiting")
    sampling = SamplingParams(max_tokens=10, min_tokens=4, repetition_penalty=1.5, prompt_logprobs=0)
    resumed = Resumed(token_ids=[7, 8, 9], num_scored=19, first_token_age_s=2.0)
    request = AddRequest(
        request_id="resumed",
        prompt_token_ids=[1] * 20,
        end_token_ids=[5],
        sampling=sampling,
        age_s=3.0,
        resumed=resumed,
    )
    sequence = parts.add_request(request)
    assert parts.requests.in_order() == [sequence, waiting]  # it is the older one
    assert parts.requests.admit(sequence)
    state = sequence.state_for(sequence.allocations[0])
    assert (state.history, state.num_prompt_tokens, state.min_end_position) == ([1] * 20 + [7, 8, 9], 20, 24)
    assert not sequence.lacks_prompt_logprobs
    parts.steps(7)
    assert sequence.phase is Phase.FINISHED
    outputs = [output for output in parts.outputs if output.request_id == "resumed"]
    assert [output.token_ids for output in outputs] == [[7]] * 7
    assert [output.finish_reason for output in outputs] == [None] * 6 + ["length"]
    assert sequence.metrics.ttft_ms == pytest.approx(1000.0)
    e2e_ms, tpot_ms = sequence.metrics.e2e_ms, sequence.metrics.tpot_ms
    assert e2e_ms == pytest.approx(3000.0)
    assert tpot_ms == pytest.approx(2000.0 / 9)
    assert parts.requests.counts["generated_tokens"] == 7
    assert parts.requests.counts["prompt_tokens"] == 0  # the earlier scheduler has counted them


def decode_worker(parts: SchedulerParts, name: str, role: InstanceRole = InstanceRole.DECODE) -> WorkerHandle:
    """Announce another worker of the first instance."""
    worker = WorkerHandle(name, role, 50, "nowhere", parts.clock, parts.outbox)
    parts.instance.workers[name] = worker
    return worker


def test_a_new_worker_is_told_of_running_sequences_before_its_first_step(parts: SchedulerParts) -> None:
    running = [parts.add(name) for name in "abc"]
    assert all(parts.requests.admit(sequence) for sequence in running)
    parts.steps(3)
    waiting = parts.add("waiting")
    assert parts.requests.admit(waiting)  # its prompt is not computed yet, and another worker may do that
    late = decode_worker(parts, "late")
    parts.register(parts.instance, late, 77, parts.instance.arena_epoch)
    parts.planner.introduce(parts.instance, late)
    parts.steps(14)  # meanwhile the sequences continue and need another block
    assert parts.planner.plan_step(parts.instance, late, {InstanceRole.DECODE})
    for _ in range(2):
        parts.confirm(late)
    introduction, first = parts.plans(late)
    blocks = {state.slot: list(state.block_ids) for state in introduction.new_sequences}
    slots = {sequence: allocation.slot for sequence, allocation in parts.instance.allocations.items()}
    assert introduction.rows == []
    assert set(blocks) == {slots[sequence] for sequence in running}
    assert [state.slot for state in first.new_sequences] == [slots[waiting]]
    for row in first.rows:
        assert row.token_ids == [7]
        blocks[row.slot] = blocks.get(row.slot, []) + row.new_block_ids
    for sequence in running:
        assert blocks[slots[sequence]] == list(parts.instance.allocations[sequence].block_ids)


# --- prompts that begin alike ---------------------------------------------------------------------


def prompts(parts: SchedulerParts, *lengths: int, **sampling: Any) -> list[Sequence]:
    """Admit prompts of the same token; block size is 16."""
    params = SamplingParams(max_tokens=5, **sampling)
    requests = [
        AddRequest(request_id=f"r{number}", prompt_token_ids=[1] * length, end_token_ids=[], sampling=params)
        for number, length in enumerate(lengths, len(parts.requests))
    ]
    sequences = [parts.add_request(request) for request in requests]
    assert all(parts.requests.admit(sequence) for sequence in sequences)
    return sequences


def test_prompts_of_one_step_share_the_blocks_that_it_fills(parts: SchedulerParts) -> None:
    first, second, third = prompts(parts, 100, 100, 97)
    free = parts.instance.pool.num_free_blocks
    assert parts.plan()
    [plan] = parts.plans(parts.worker)
    # A row of one token would read before the step has written; so two blocks of the last prompt are its own.
    assert [(row.start, row.num_tokens) for row in plan.rows] == [(0, 100), (96, 4), (80, 17)]
    blocks = [state.block_ids for state in plan.new_sequences]
    assert blocks[1][:6] == blocks[0][:6]
    assert blocks[2][:5] == blocks[0][:5]
    assert parts.instance.pool.num_free_blocks == free + 6 + 5
    parts.requests.finish(first, "abort")  # its step still fills the blocks
    parts.confirm(parts.worker)
    parts.instance.pool.check_consistency()
    assert (second.num_cached_tokens, third.num_cached_tokens) == (96, 80)
    parts.steps(4)
    assert second.phase is third.phase is Phase.FINISHED
    assert parts.instance.pool.num_free_blocks == parts.instance.pool.total_blocks
    parts.instance.pool.check_consistency()


def test_two_prompts_compute_what_they_share_in_turns(chunked_parts: SchedulerParts) -> None:
    parts = chunked_parts
    first, second = prompts(parts, 100, 130)
    # Each joins the other at the end of a block.
    for expected in ([(0, 40), (32, 40)], [(40, 8), (72, 40)], [(96, 4), (112, 18)]):
        assert parts.plan()
        rows = [(row.start, row.num_tokens) for row in parts.plans(parts.worker)[-1].rows if row.token_ids is not None]
        assert rows == expected
    for _ in range(3):
        parts.confirm(parts.worker)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (48, 32)
    assert first.phase is second.phase is Phase.DECODING


def test_a_prompt_knows_an_earlier_one_that_begins_alike_until_it_is_computed(parts: SchedulerParts) -> None:
    [first], [second], [third] = (prompts(parts, length) for length in (100, 60, 100))
    assert [first.alike, second.alike, third.alike] == [None, first, first]
    assert [second.num_alike_tokens, third.num_alike_tokens] == [48, 96]
    parts.requests.preempt(first)
    assert first.alike is None  # the others came later
    assert parts.requests.admit(first)
    parts.steps(1)
    assert second.alike is third.alike is None


def test_prompts_with_another_salt_or_with_log_probabilities_share_no_block_that_is_filled(
    parts: SchedulerParts,
) -> None:
    prompts(parts, 100)
    prompts(parts, 100, cache_salt="a")
    prompts(parts, 100, prompt_logprobs=0)
    assert parts.plan()
    assert [row.start for row in parts.plans(parts.worker)[0].rows] == [0, 0, 0]


def test_a_prompt_that_joined_a_step_of_a_lost_worker_begins_anew(parts: SchedulerParts) -> None:
    first, second = prompts(parts, 100, 100)
    assert parts.plan()
    other = decode_worker(parts, "other", InstanceRole.UNIFIED)
    parts.register(parts.instance, other, 77, parts.instance.arena_epoch)
    parts.worker.hello = None
    parts.requests.on_worker_lost(parts.instance, parts.worker)
    assert [sequence.phase for sequence in (first, second)] == [Phase.PREFILLING, Phase.WAITING]
    parts.requests.on_steps_lost(parts.instance.forget_worker(parts.worker))
    parts.instance.pool.check_consistency()
    assert parts.requests.admit(second)
    phases = {InstanceRole.PREFILL, InstanceRole.DECODE}
    assert parts.planner.plan_step(parts.instance, other, phases)
    assert [(row.start, row.num_tokens) for row in parts.plans(other)[-1].rows] == [(0, 100), (96, 4)]
    parts.confirm(other)
    assert [sequence.phase for sequence in (first, second)] == [Phase.DECODING, Phase.DECODING]
    parts.instance.pool.check_consistency()


Pair = tuple[SchedulerParts, WorkerHandle, WorkerHandle]


@pytest.fixture
def pair(parts: SchedulerParts) -> Pair:
    """Two decode workers: the first has a step of two sequences in flight, the second has the step after it."""
    for name in "ab":
        assert parts.requests.admit(parts.add(name))
    parts.steps(3)
    first, second = decode_worker(parts, "first"), decode_worker(parts, "second")
    for epoch, worker in enumerate((first, second), 77):
        parts.register(parts.instance, worker, epoch, parts.instance.arena_epoch)
        assert parts.decode(worker)
    return parts, first, second


def test_a_worker_has_its_plan_before_the_step_of_another_is_done(pair: Pair) -> None:
    parts, first, second = pair
    [ahead], [plan] = parts.plans(first), parts.plans(second)
    assert (ahead.after, [row.token_ids for row in ahead.rows]) == (None, [[7], [7]])
    assert ahead.cell is not None
    assert plan.cell is not None
    assert plan.after == StepRef(cell=ahead.cell, step_id=ahead.step_id)
    assert [(row.token_ids, row.sampled_elsewhere) for row in plan.rows] == [(None, True)] * 2
    assert parts.decode(second)
    assert parts.plans(second)[1].after is None  # it has waited already
    assert parts.decode(first)
    assert parts.plans(first)[1].after == StepRef(cell=plan.cell, step_id=parts.plans(second)[1].step_id)
    # Results are confirmed in the order of the steps, not of their arrival.
    order = []
    second.results.extend(parts.result(second, step) for step in range(2))
    assert parts.instance.choice.next_to_confirm() is None
    first.results.extend(parts.result(first, step) for step in range(2))
    while (worker := parts.instance.choice.next_to_confirm()) is not None:
        order.append(worker.id)
        parts.requests.on_step_done(worker, worker.results.popleft())
    assert order == ["first", "second", "second", "first"]
    assert [len(sequence.tokens) for sequence in parts.instance.allocations] == [20 + 3 + 4] * 2


def test_a_draining_worker_computes_until_its_successor_is_registered(pair: Pair) -> None:
    parts, old, other_share = pair
    assert parts.requests.admit(parts.add("prompt"))  # both phases are busy
    old.percentage, other_share.percentage = 40, 100
    old.is_draining = True
    new = decode_worker(parts, "new")

    def decodes() -> WorkerHandle:
        chosen = parts.instance.choice.choose_workers()
        [worker] = [worker for worker, phases in chosen.items() if InstanceRole.DECODE in phases]
        return worker

    parts.instance.choice.shares[InstanceRole.DECODE] = 50
    assert decodes() is old
    parts.register(parts.instance, new, 79, parts.instance.arena_epoch)
    assert decodes() is new


def test_rows_that_continue_a_lost_step_are_void(pair: Pair) -> None:
    parts, first, second = pair
    first.hello = None
    parts.requests.on_worker_lost(parts.instance, first)
    assert not parts.decode(second)  # the lost worker's process may still write
    parts.requests.on_steps_lost(parts.instance.forget_worker(first))
    assert parts.decode(second)  # both steps in one order, at one worker
    [lost] = parts.plans(first)
    again = parts.plans(second)[1]
    assert [(row.start, row.token_ids) for row in again.rows] == [(row.start, [7]) for row in lost.rows]
    for _ in range(2):
        parts.confirm(second)
    assert [len(sequence.tokens) for sequence in parts.instance.allocations] == [20 + 3 + 1] * 2
    for sequence, allocation in parts.instance.allocations.items():
        assert (allocation.num_inflight, allocation.num_planned, sequence.num_setbacks) == (
            0,
            len(sequence.tokens) - 1,
            0,
        )


def test_rows_before_a_lost_step_count(pair: Pair) -> None:
    parts, first, second = pair
    second.hello = None
    parts.requests.on_worker_lost(parts.instance, second)
    parts.requests.on_steps_lost(parts.instance.forget_worker(second))
    parts.confirm(first)
    assert parts.decode(first)
    assert [row.start for row in parts.plans(first)[1].rows] == [row.start + 1 for row in parts.plans(first)[0].rows]
    parts.confirm(first)
    assert [len(sequence.tokens) for sequence in parts.instance.allocations] == [20 + 3 + 2] * 2


def test_a_wait_on_the_board_ends_when_the_step_is_done_or_lost() -> None:
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
    reader.on_step_lost(StepRef(cell=3, step_id=53))  # and all before it
    lost.join(20)
    assert not lost.is_alive()
    reader.limit_waits(0.0)
    with pytest.raises(TimeoutError):
        reader.wait(StepRef(cell=3, step_id=54))


def answer(parts: SchedulerParts, *token_ids: int, errors: dict[int, str] | None = None) -> None:
    """The first worker has done its oldest step, with these tokens."""
    result = msgspec.structs.replace(parts.result(parts.worker, 0), token_ids=list(token_ids), row_errors=errors)
    parts.requests.on_step_done(parts.worker, result)


def test_a_row_without_a_token_is_planned_again_and_others_go_on(parts: SchedulerParts) -> None:
    """A worker has no mask of a grammar yet: after the prompt, and after a token."""
    late, other = parts.add("late"), parts.add("other")
    assert parts.requests.admit(late)
    assert parts.requests.admit(other)
    allocation = parts.instance.allocations[late]
    for length in (20, 21):
        assert parts.plan()
        answer(parts, NO_TOKEN, 7)
        assert len(late.tokens) == length
        assert (allocation.num_planned, allocation.num_computed) == (length - 1, length - 1)
        assert parts.plan()
        assert len(parts.worker.inflight[-1].rows) == 1  # the other one alone, until the late one's time has come
        answer(parts, 7)
        parts.clock.advance(late.planned_from)
        assert parts.instance.plan_at <= late.planned_from
        assert parts.plan()
        [row] = [row for row in parts.worker.inflight[-1].rows if row.sequence is late]
        assert (row.start, row.end, row.samples) == (length - 1, length, True)
        answer(parts, 7, 7)
        assert len(late.tokens) == length + 1
    assert len(other.tokens) == 26


def test_a_row_that_can_get_no_token_ends_its_request_alone(parts: SchedulerParts) -> None:
    bad, other = parts.add("bad"), parts.add("other")
    assert parts.requests.admit(bad)
    assert parts.requests.admit(other)
    assert parts.plan()
    answer(parts, NO_TOKEN, 7, errors={0: "the grammar is too complex"})
    assert bad.phase is Phase.FINISHED
    assert [(output.request_id, output.error) for output in parts.outputs if output.error] == [
        ("bad", "the grammar is too complex")
    ]
    parts.steps(3)
    assert len(other.tokens) == 24


def test_best_effort_requests_give_their_place_to_others() -> None:
    parts = SchedulerParts()
    sampling = SamplingParams(max_tokens=500, priority="batch")
    for number in range(9):
        parts.add_request(
            AddRequest(request_id=f"b{number}", prompt_token_ids=[1] * 20, end_token_ids=[], sampling=sampling)
        )
    batch = list(parts.requests.waiting)
    assert [parts.requests.admit(sequence) for sequence in batch] == 7 * [True] + 2 * [False]  # one slot stays free
    others = [parts.add(f"o{number}") for number in range(3)]
    assert list(parts.requests.in_order())[:3] == others
    assert all(parts.requests.admit(sequence) for sequence in others)
    assert [sequence.phase for sequence in batch[4:]] == [Phase.PREFILLING] + 4 * [Phase.WAITING]
    assert parts.requests.counts["preemptions"] == 2
    parts.steps(2)
    [plan] = parts.plans(parts.worker)[1:]
    assert len(plan.rows) == 8, "there is time for all"
    assert not parts.requests.admit(batch[5])


def test_a_new_request_does_not_take_the_block_that_a_running_one_waits_for() -> None:
    """Else that one preempts it and waits for the block anew, for ever if a copy from a tier pins it each time."""
    parts = SchedulerParts(decode_headroom_tokens=0, enable_prefix_caching=False)
    running, other = parts.add("running"), parts.add("other", max_tokens=1)
    assert parts.requests.admit(running)
    parts.steps(1)
    allocation = parts.instance.allocations[running]
    while not allocation.lacks_block:
        parts.steps(1)
    assert parts.instance.num_short_of_a_block == 1
    pool = parts.instance.pool
    pool.allocate_blocks("others", pool.num_free_blocks - 2)
    assert not parts.requests.admit(other)  # which would take the last two
    parts.steps(1)
    assert not allocation.lacks_block
    parts.requests.finish(running, "abort")
    assert parts.requests.admit(other)
