"""Simulated devices and their workers: plans come in, steps take the time of the profile, results go out."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from hbserve.config import InstanceRole
from hbserve.messages.tiers import LoadBlocks, StoreBlocks
from hbserve.messages.transfer import (
    CloseLink,
    ConnectLink,
    DisconnectLink,
    LinkClosed,
    LinkOpened,
    OpenLink,
    Peer,
    SendBlocks,
    TransferResult,
)
from hbserve.messages.worker import (
    Hello,
    InstanceCommand,
    InstanceReply,
    Leaving,
    Ping,
    PlanRow,
    Pong,
    Shutdown,
    StepPlan,
    StepResult,
)
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, keys_of_guesses, num_pairs
from hbserve.simulate.clock import Event, Progress, SimulatedClock
from hbserve.simulate.config import BLOCK_SIZE
from hbserve.simulate.requests import VOCAB_SIZE
from hbserve.simulate.tiers import SimulatedHostTier, SimulatedLanes
from hbserve.speculation.rounds import next_round

DECODE_SLOWDOWN, PROMPT_SLOWDOWN = 1.06, 1.02
"""Time of a step without and with prompts in a serving system over that in a profile, which repeats one step of a round
size. Under load an H200 reaches its limit of power and lowers its clock by a fifth."""
PLAN_DELAY_S, RESULT_DELAY_S = 2.6e-3, 0.7e-3
"""Time from a decision to a step with prompts that is ready on the device; from the end of a step to its result."""
_SHORT_PLAN_DELAY_S = 1.6e-3
"""The same as `PLAN_DELAY_S` for a step that only decodes: its plan is small."""
_ROUND_DELAY_S = 0.2e-3
"""Time between two rounds of a step."""
_KV_BYTES_PER_TOKEN = 131_072  # 32 layers, 8 KV heads of 128, two bytes
_TRANSFER_BYTES_PER_S = 357e9  # NCCL between two H200s, 256 MiB at a time
_NUM_LAYERS = 32
ARENA_EPOCH = 1
"""Epoch of every simulated KV memory. No memory is lost here, so one number serves them all. A worker with another
epoch works on the memory of a resident process."""
Send = Callable[[InstanceReply], None]


def _work_of(rows: Iterable[PlanRow]) -> StepWork:
    """Return what a step computes."""
    tokens = batch = 0
    context = pairs = 0.0
    for row in rows:
        count = row.num_tokens
        if count == 1 + row.num_drafts:
            batch += count
            context += row.start + keys_of_guesses(row.num_drafts, row.start)
        else:
            tokens += count
            pairs += num_pairs(count, row.start)
    return StepWork(batch, context, tokens, pairs)


class SimulatedDevice:
    """One GPU and the KV memory on it, which its workers share.

    Args:
        number: its rank among the KV transfer peers.
        host: tier in the host's memory; None: there is none.

    Attributes:
        workers: that have not ended.
        sends_until, receives_until: when the transfers under way from and to it have ended.
        on_step: called at the end of each step, before its result is sent, with its worker, its id and when it began.
    """

    def __init__(
        self,
        clock: SimulatedClock,
        steps: StepTimePredictor,
        num_blocks: int,
        number: int,
        host: SimulatedHostTier | None = None,
    ) -> None:
        self.clock, self.steps, self.num_blocks, self.number = clock, steps, num_blocks, number
        self.host, self.lanes = host, SimulatedLanes(clock, BLOCK_SIZE * _KV_BYTES_PER_TOKEN)
        self.workers: list[SimulatedWorker] = []
        self.sends_until = self.receives_until = 0.0
        self.on_step: Callable[[SimulatedWorker, int, float], None] | None = None
        self._done: dict[int, int] = {}  # last finished step, by cell of the step board

    def on_step_done(self, cell: int, step_id: int) -> None:
        """Mark a step on the board, and begin those that wait for it."""
        self._done[cell] = step_id
        for worker in self.workers:
            worker.begin_next()

    def is_done(self, cell: int, step_id: int) -> bool:
        """Whether a step of a worker is done."""
        return self._done.get(cell, 0) >= step_id

    def set_speeds(self) -> None:
        """Slow down the phases while both run, as much as was measured."""
        if len(self.workers) < 2:
            return
        prefill = decode = None
        for worker in self.workers:
            if worker.progress is not None:
                worker.progress.set_speed(1.0)
                if worker.role is InstanceRole.PREFILL:
                    prefill = worker
                elif worker.role is InstanceRole.DECODE:
                    decode = worker
        if prefill is not None and decode is not None:
            assert prefill.progress is not None
            assert decode.progress is not None
            tokens = prefill.work.prompt_tokens + prefill.work.decode_rows
            slowdown = self.steps.slowdown(prefill.percentage, decode.percentage, decode.alone_s, tokens)
            prefill.progress.set_speed(1 / slowdown.prefill)
            decode.progress.set_speed(1 / slowdown.decode)


class SimulatedWorker:
    """One worker: it does its plans in order. No worker fails.

    Args:
        send: to the scheduler.
        device_of: returns the device of a KV transfer peer, by its rank.
        on_exit: called when it has ended, as the scheduler told it to; None: it owns the memory and never ends.

    Attributes:
        progress: of the step that runs; ``work``: its work; ``alone_s``: its time if nothing else runs.
    """

    def __init__(
        self,
        worker_id: str,
        role: InstanceRole,
        percentage: int,
        device: SimulatedDevice,
        send: Send,
        device_of: Callable[[int], SimulatedDevice],
        on_exit: Callable[[SimulatedWorker], None] | None,
    ) -> None:
        owns_memory = on_exit is None
        self.id, self.role, self.percentage, self.device = worker_id, role, percentage, device
        self._clock, self._steps = device.clock, device.steps.at(percentage)
        self._send, self._device_of, self._on_exit = send, device_of, on_exit
        self._plans: deque[tuple[StepPlan, float]] = deque()  # with the time at which each is ready on the device
        self._alarm: Event | None = None
        self._ready_at = self._last_end = 0.0
        self._is_dismissed = False
        self._epoch = ARENA_EPOCH if owns_memory else ARENA_EPOCH + 1
        self.progress: Progress | None = None
        self.work = StepWork(0, 0)
        self.alone_s = 0.0
        device.workers.append(self)

    def on_command(self, command: InstanceCommand) -> None:
        """Take a message of the scheduler."""
        match command:
            case StepPlan():
                prompts = any(row.num_tokens > 1 + row.num_drafts for row in command.rows)
                delay_s = PLAN_DELAY_S if prompts else _SHORT_PLAN_DELAY_S
                self._ready_at = max(self._ready_at, self._clock.now + delay_s)  # plans are prepared in order
                self._plans.append((command, self._ready_at))
                self.begin_next()
            case Ping(known_epoch=known):
                self._send(Pong(epoch=self._epoch) if known == self._epoch else self._hello())
            case Shutdown():
                self._is_dismissed = True
                self._end_if_idle()
            case OpenLink(source_id=source_id, link_epoch=epoch):
                peers = [Peer(rank=self.device.number, epoch=self._epoch, endpoint="", link_epoch=epoch)]
                self._send(LinkOpened(epoch=self._epoch, source_id=source_id, link_epoch=epoch, peers=peers))
            case CloseLink(source_id=source_id, link_epoch=epoch):
                self._send(LinkClosed(epoch=self._epoch, source_id=source_id, link_epoch=epoch))
            case ConnectLink() | DisconnectLink():
                pass
            case StoreBlocks() | LoadBlocks():
                self.device.lanes.copy(command, self._send)
            case _:
                raise AssertionError(f"{self.id} got {command}, which is sent after failures only")

    def _hello(self) -> Hello:
        return Hello(
            instance_id=self.id,
            role=self.role,
            serves_as=self.role,
            epoch=self._epoch,
            arena_epoch=ARENA_EPOCH,
            pid=0,
            model="simulated",
            dtype="bfloat16",
            kv_dtype="bfloat16",
            num_blocks=self.device.num_blocks,
            block_size=BLOCK_SIZE,
            block_bytes=BLOCK_SIZE * _KV_BYTES_PER_TOKEN,
            num_layers=_NUM_LAYERS,
            head_bytes=1,
            max_model_len=VOCAB_SIZE,
            vocab_size=VOCAB_SIZE,
            device="simulated",
            peers=[Peer(rank=self.device.number, epoch=self._epoch, endpoint="")],
            one_sided=True,
            tiers=[] if self.device.host is None else [self.device.host.info],
        )

    # --- steps -----------------------------------------------------------------------------------

    def begin_next(self) -> None:
        """Begin the next step, if it may begin now."""
        if self.progress is not None or not self._plans:
            return
        plan, ready_at = self._plans[0]
        after = plan.after
        if after is not None and not self.device.is_done(after.cell, after.step_id):
            return
        if ready_at > self._clock.now:
            if self._alarm is None:
                self._alarm = self._clock.at(ready_at, self._on_ready)
            return
        self._plans.popleft()
        self.work = work = _work_of(plan.rows)
        slowdown = PROMPT_SLOWDOWN if work.prompt_tokens else DECODE_SLOWDOWN
        self.alone_s = slowdown * self._steps.seconds(work) if plan.rows else 0.0
        on_done = functools.partial(self._on_done, plan, ready_at)
        self.progress = Progress(self._clock, self.alone_s, on_done)
        self.device.set_speeds()

    def _on_ready(self) -> None:
        self._alarm = None
        self.begin_next()

    def _on_done(self, plan: StepPlan, ready_at: float) -> None:
        assert self.progress is not None
        now, began = self._clock.now, self.progress.started
        self.progress = None
        if self.device.on_step is not None:
            self.device.on_step(self, plan.step_id, began)
        result = StepResult(
            epoch=self._epoch,
            step_id=plan.step_id,
            # each token is its position: so a guess is found at its place alone
            token_ids=[
                (row.start + row.num_tokens - row.num_drafts + place) % VOCAB_SIZE
                for row in plan.rows
                for place in range(row.num_samples)
            ],
            logprobs=None,
            busy_s=now - began,
            early_s=self._last_end - ready_at,
        )
        following = next_round(plan, result, lambda slot: ())
        self._report(msgspec.structs.replace(result, more=following is not None))
        self._last_end = now
        if following is not None:
            self._plans.appendleft((following, now + _ROUND_DELAY_S))
            self.device.set_speeds()
            self.begin_next()
            return
        for blocks in plan.sends:
            self._send_blocks(blocks, now - began)
        self.device.set_speeds()
        self.begin_next()
        if plan.cell is not None:
            self.device.on_step_done(plan.cell, plan.step_id)
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._is_dismissed and self.progress is None and not self._plans:
            self.device.workers.remove(self)
            self._report(Leaving(epoch=self._epoch))
            if self._on_exit is not None:
                self._on_exit(self)

    def _report(self, reply: StepResult | Leaving) -> None:
        self._clock.at(self._clock.now + RESULT_DELAY_S, lambda: self._send(reply))

    # --- transfers -------------------------------------------------------------------------------

    def _send_blocks(self, blocks: SendBlocks, step_s: float) -> None:
        """Send blocks after a step, or a group of layers since the step has stored it; one transfer at a time."""
        source, target = self.device, self._device_of(blocks.targets[0].rank)
        later_groups = blocks.layers.count - 1 - blocks.layers.index
        stored_at = self._clock.now - step_s * later_groups / blocks.layers.count
        num_bytes = len(blocks.block_ids) * BLOCK_SIZE * _KV_BYTES_PER_TOKEN // blocks.layers.count
        seconds = num_bytes / _TRANSFER_BYTES_PER_S
        begin = max(stored_at, source.sends_until, target.receives_until)
        source.sends_until = target.receives_until = begin + seconds
        result = TransferResult(
            epoch=self._epoch,
            transfer_id=blocks.transfer_id,
            sent=True,
            num_bytes=num_bytes,
            seconds=seconds,
            queued_s=begin - stored_at,
        )
        self._clock.at(begin + seconds, lambda: self._send(result))
