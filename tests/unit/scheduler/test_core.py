"""The scheduler's core without any process: a test plays the client, the worker and the clock."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hbserve import PdDisaggConfig, SamplingParams
from hbserve.config import InstanceRole
from hbserve.messages.admin import InstanceChanged, RemoveInstance, SetRole
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import AddRequest, Attach, OutputBatch, Ready, SubscribeReady
from hbserve.messages.worker import InstanceCommand, Ping, Pong, StepPlan, StepResult
from hbserve.scheduler.core_io import ClientGone, ConnectionBroke, FromClient, FromWorker, Outbox, Start
from hbserve.scheduler.scheduler import CpuScheduler
from tests.support.hellos import hello
from tests.support.paths import ROOT

DEMO = ROOT / "examples" / "models" / "hbserve-demo"
START = Start(now=50.0, time_ns=1000)
HELLO = hello(num_blocks=64)
REQUEST = AddRequest(
    request_id="a",
    prompt_token_ids=[1, 2, 3],
    end_token_ids=[],
    sampling=SamplingParams(temperature=0, max_tokens=2),
)


def make_scheduler(scheduler_class: type[CpuScheduler] = CpuScheduler) -> CpuScheduler:
    config = PdDisaggConfig.from_arguments(str(DEMO), mode="unified", device="cpu").freeze()
    return scheduler_class(config, {"unified-0": "tcp://worker:1"}, START)


def commands(outbox: Outbox) -> list[InstanceCommand]:
    assert {connection for connection, _ in outbox.to_workers} <= {1}
    return [command for _, command in outbox.to_workers]


def test_a_request_from_its_arrival_to_its_end() -> None:
    scheduler = make_scheduler()
    # The first step asks the shell to connect, greets the worker, and says when it wants to be called again.
    outbox = scheduler.step(50.0)
    assert outbox.connects == [(1, "tcp://worker:1")]
    assert commands(outbox) == [Ping(scheduler_epoch=1000, known_epoch=0)]
    assert outbox.call_at == 50.0 + scheduler.config.rpc.heartbeat_interval_s
    # A client waits for the system; the worker registers.
    outbox = scheduler.step(50.1, [FromClient(b"c", SubscribeReady(deadline_s=9.0)), FromWorker(1, HELLO)])
    formats = {"dtype": "float32", "weights": "float32", "kv_cache_dtype": "float32"}
    assert outbox.to_clients == [(b"c", Ready(max_model_len=1000, vocab_size=1024, formats=formats))]
    assert [text for _, text in outbox.log] == ["ready: unified-0: cpu, 64 KV blocks"]
    # A request is admitted and planned in the step in which it comes: its prompt, and the step after that.
    outbox = scheduler.step(50.2, [FromClient(b"c", REQUEST)])
    prompt, decode = (command for command in commands(outbox) if isinstance(command, StepPlan))
    assert [row.token_ids for row in prompt.rows] == [[1, 2, 3]]
    assert (prompt.step_id, decode.step_id) == (1001, 1002)
    # Its tokens go to its client, step by step.
    for token, step in ((8, prompt), (9, decode)):
        result = StepResult(epoch=1, step_id=step.step_id, token_ids=[token], logprobs=None, busy_s=0.001)
        outbox = scheduler.step(50.3, [FromWorker(1, result)])
        [(client, batch)] = outbox.to_clients
        assert isinstance(batch, OutputBatch)
        assert (client, [output.token_ids for output in batch.outputs]) == (b"c", [[token]])
        ends = [output.finish_reason for output in batch.outputs]
    assert ends == ["length"]
    assert [(request.request_id, request.outcome) for request in outbox.ended] == [("a", "completed")]
    assert scheduler.counts["completed"] == 1


def test_a_first_token_does_not_wait_behind_the_tokens_of_streams() -> None:
    """A client brings outputs to their readers in the order in which they come, and prompts are the last rows."""
    scheduler = make_scheduler()
    stream = msgspec.structs.replace(REQUEST, sampling=SamplingParams(temperature=0, max_tokens=9))
    outbox = scheduler.step(50.0, [FromWorker(1, HELLO), FromClient(b"c", stream)])
    planned = [command for command in commands(outbox) if isinstance(command, StepPlan)]
    scored = SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=0)
    comes = FromClient(b"c", msgspec.structs.replace(REQUEST, request_id="b", sampling=scored))
    batches: list[list[tuple[str, list[int]]]] = []
    for number in range(4):
        plan = planned.pop(0)
        scores = [[TokenLogprobs(token=-1.0, top_ids=[], top=[])] * len(row.next_token_ids or ()) for row in plan.rows]
        result = StepResult(
            epoch=1,
            step_id=plan.step_id,
            token_ids=[number] * len(plan.rows),
            logprobs=None,
            busy_s=0.001,
            prompt_logprobs=[entries for entries in scores if entries] or None,
        )
        outbox = scheduler.step(50.1 + number, [FromWorker(1, result), *([comes] if not number else ())])
        planned += [command for command in commands(outbox) if isinstance(command, StepPlan)]
        batches += [
            [(output.request_id, output.token_ids) for output in batch.outputs]
            for _, batch in outbox.to_clients
            if isinstance(batch, OutputBatch)
        ]
    # the first output of b has what it asks for of its prompt
    assert batches == [[("a", [0])], [("a", [1])], [("b", []), ("b", [2])], [("a", [2])], [("a", [3]), ("b", [3])]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (StepResult(epoch=1, step_id=1002, token_ids=[8], logprobs=None, busy_s=0.1), "step 1002, and step 1001 was"),
        (StepResult(epoch=1, step_id=1001, token_ids=[], logprobs=None, busy_s=0.1), "with 0 tokens instead of 1"),
        (StepResult(epoch=1, step_id=1001, token_ids=[8], logprobs=[], busy_s=0.1), "with other log-probabilities"),
    ],
)
def test_a_worker_that_answers_wrongly_is_lost_and_the_scheduler_goes_on(answer: StepResult, reason: str) -> None:
    scheduler = make_scheduler()
    outbox = scheduler.step(50.0, [FromWorker(1, HELLO), FromClient(b"c", REQUEST)])
    outbox = scheduler.step(50.1, [FromWorker(1, answer), FromWorker(1, answer)])
    [(_, line)] = outbox.log
    assert line.startswith("lost: unified-0: it answered step")
    assert reason in line
    outbox = scheduler.step(50.3, [FromWorker(1, msgspec.structs.replace(HELLO, epoch=2, arena_epoch=2))])
    [prompt, *_] = (command for command in commands(outbox) if isinstance(command, StepPlan))
    assert [row.token_ids for row in prompt.rows] == [[1, 2, 3]]


def test_a_worker_with_kv_of_another_dtype_is_refused_by_name() -> None:
    scheduler = make_scheduler()
    scheduler.step(50.0, [FromWorker(1, HELLO)])
    other = msgspec.structs.replace(HELLO, epoch=2, arena_epoch=2, kv_dtype="float8_e4m3fn")
    outbox = scheduler.step(50.1, [FromWorker(1, other)])
    assert [text for _, text in outbox.log if "KV dtype float8_e4m3fn, not float32" in text]


def test_a_request_survives_the_loss_of_its_worker() -> None:
    scheduler = make_scheduler()
    scheduler.step(50.0, [FromWorker(1, HELLO), FromClient(b"c", REQUEST)])
    outbox = scheduler.step(51.0, [ConnectionBroke(1)])
    assert [text for _, text in outbox.log] == ["lost: unified-0: its connection broke"]
    outbox = scheduler.step(51.05, [FromWorker(1, msgspec.structs.replace(HELLO, epoch=2, arena_epoch=2))])
    assert not any(isinstance(command, StepPlan) for command in commands(outbox))
    assert outbox.call_at == 51.1  # a retry is not made at once
    outbox = scheduler.step(outbox.call_at)
    [prompt, *_] = (command for command in commands(outbox) if isinstance(command, StepPlan))
    assert (prompt.epoch, [row.token_ids for row in prompt.rows]) == (2, [[1, 2, 3]])


def test_silence_counts_unless_the_scheduler_itself_was_asleep() -> None:
    scheduler = make_scheduler()
    outbox = scheduler.step(50.0, [FromWorker(1, HELLO), FromClient(b"c", REQUEST)])
    outbox = scheduler.step(outbox.call_at + 1000.0)
    assert commands(outbox) == [Ping(scheduler_epoch=1000, known_epoch=1)]
    assert not outbox.log
    outbox = scheduler.step(outbox.call_at, [FromWorker(1, Pong(epoch=1))])
    answered_at = scheduler.now
    while not outbox.log:
        outbox = scheduler.step(outbox.call_at)
    silence_s = scheduler.now - answered_at
    assert [text for _, text in outbox.log] == [f"lost: unified-0: no sign of life for {silence_s:.1f} s"]
    timeout_s, interval_s = scheduler.config.rpc.heartbeat_timeout_s, scheduler.config.rpc.heartbeat_interval_s
    assert timeout_s < silence_s <= timeout_s + 2 * interval_s


class Waits(CpuScheduler):
    """A user's policy that waits for something."""

    async def _schedule_waiting_requests(self) -> None:
        await _Forever()


class _Forever:
    def __await__(self) -> Any:
        yield


def test_a_policy_that_waits_cannot_run_in_a_plain_step() -> None:
    with pytest.raises(RuntimeError, match=r"Waits\._schedule_waiting_requests waits for something: use step_async"):
        make_scheduler(Waits).step(50.0)


@pytest.mark.parametrize(
    "message",
    [
        SetRole(query_id=1, instance_id="prefill-0", role=InstanceRole.DECODE, deadline_s=1.0),
        RemoveInstance(query_id=1, instance_id="prefill-0", deadline_s=1.0),
    ],
)
def test_the_only_instance_of_a_phase_stays_even_while_it_is_lost(message: SetRole | RemoveInstance) -> None:
    """Requests wait for it to come back; without it, or in its new role, nothing would compute them."""
    config = PdDisaggConfig.from_arguments(str(DEMO), mode="disaggregated", device="cpu").freeze()
    scheduler = CpuScheduler(config, {name: f"tcp://{name}:1" for name in ("prefill-0", "decode-0")}, START)
    [(client, answer)] = scheduler.step(50.0, [FromClient(b"operator", message)]).to_clients
    assert isinstance(answer, InstanceChanged)
    assert (client, answer.error) == (b"operator", "prefill-0 is the only prefill instance")
    ended = RemoveInstance(query_id=2, instance_id="prefill-0", deadline_s=0.0, has_ended=True)
    [(_, answer)] = scheduler.step(51.0, [FromClient(b"launcher", ended)]).to_clients
    assert isinstance(answer, InstanceChanged)
    assert answer.error is None  # an earlier scheduler has removed it


def test_nothing_is_kept_of_clients_that_have_gone() -> None:
    scheduler = make_scheduler()
    scheduler.step(50.0, [FromWorker(1, HELLO)])
    for number in range(3):
        client = f"c{number}".encode()
        scheduler.step(
            51.0 + number, [FromClient(client, Attach(client_id=f"id{number}")), FromClient(client, REQUEST)]
        )
        scheduler.step(51.5 + number, [ClientGone(client)])
    assert not scheduler._clients._connections
    assert scheduler.counts["aborted"] == 3
