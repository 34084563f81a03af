"""The scheduler's view of one worker: its connection, its steps in flight, and what it has done."""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import dataclass, field

from hbserve.config import InstanceRole
from hbserve.messages.worker import Hello, InstanceCommand, StepResult
from hbserve.policy.dispatch_timer import DispatchTimer
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.sequence import InflightStep
from hbserve.speculation.looks import Looks
from hbserve.speculation.measured_gain import GainMeter

_ROUND_TRIP_S = 3e-3
"""A round trip (result out, scheduling, plan in, launch) takes 1 to 3 ms: its six threads wake one after the other."""
_MAX_MORE_PLANS = 3


@dataclass(slots=True)
class Work:
    """Totals of confirmed steps: tokens sampled, seconds of the device, seconds of the host to launch them.

    Attributes:
        expert_tokens: per layer and expert, the tokens that it has computed; workers report them now and then.
    """

    num_steps: int = 0
    num_tokens: int = 0
    busy_s: float = 0.0
    host_s: float = 0.0
    expert_tokens: list[list[int]] = field(default_factory=list)

    def add(self, other: Work) -> None:
        """Add the totals of another worker."""
        self.num_steps += other.num_steps
        self.num_tokens += other.num_tokens
        self.busy_s += other.busy_s
        self.host_s += other.host_s
        self.add_expert_tokens(other.expert_tokens)

    def add_expert_tokens(self, reported: list[list[int]]) -> None:
        """Add the tokens of each layer's experts."""
        old = self.expert_tokens or [[0] * len(layer) for layer in reported]
        if reported:
            self.expert_tokens = [[*map(operator.add, *layers)] for layers in zip(old, reported, strict=False)]


def phases_of(role: InstanceRole) -> set[InstanceRole]:
    """Return the phases of a role."""
    phases = {InstanceRole.PREFILL: role.prefills, InstanceRole.DECODE: role.decodes}
    return {phase for phase, does in phases.items() if does}


class WorkerHandle:
    """One worker as the scheduler knows it; owner of the worker's steps in flight.

    Only `begin_step`, `end_step` and `drop_steps` change ``inflight``; everything else reads it.

    Attributes:
        hello: what the worker said of itself; None while it is not registered: not started yet, or lost.
        started_as: the role in the configuration of its process, which its `Hello` names.
        prepared_for: the role that it prepared for last; ``prepared_phases``: those of all roles that it prepared for.
        percentage: its share of the device.
        address: where it listens; ``connection``: the number of the connection to it.
        last_seen: when its last message came; `WorkerRegistry` sets it.
        inflight: steps that were sent and are not confirmed, oldest first.
        timing: says when the next step is to be planned.
        gain: says what drafts gain, and whether there may be any.
        is_draining: it gets no more plans where another worker can do its phase, and is told to end when it has
            nothing in flight.
        is_introduced: it has been told of the sequences that ran when it registered.
        cell: its place on the step board of the workers that share an arena; None: it has none.
        has_waited_for: the last step of another worker that one of its plans waits for.
        looks: says when guesses are looked at; waits_for_drafts: its next plan waits for a result, because of drafts
            that are to come. `DecodePlanner` changes both.
        results: results that wait until earlier steps, at other workers, are confirmed; `WorkerRegistry` changes it.
    """

    def __init__(
        self,
        worker_id: str,
        role: InstanceRole,
        percentage: int,
        address: str,
        clock: Clock,
        outbox: OutboxWriter,
    ) -> None:
        self.id = worker_id
        self.role = self.started_as = self.prepared_for = role
        self.prepared_phases = phases_of(role)
        self.percentage = percentage
        self.address = address
        self.connection = outbox.connect(address)
        self._outbox = outbox
        self.hello: Hello | None = None
        self.last_seen = clock.now
        self.inflight: deque[InflightStep] = deque()
        self.timing = DispatchTimer()
        self.gain = GainMeter()
        self.is_draining = False
        self.is_told_to_end = False
        self.is_introduced = False
        self.cell: int | None = None
        self.has_waited_for = 0
        self.looks, self.waits_for_drafts = Looks(), False
        self.results: deque[StepResult] = deque()
        self.work = Work()
        self.last_step_s = 0.0

    @property
    def ready(self) -> bool:
        """Whether plans can be sent."""
        return self.hello is not None

    @property
    def can_take_plans(self) -> bool:
        """Whether it is there and goes on."""
        return self.hello is not None and not self.is_told_to_end

    @property
    def epoch(self) -> int:
        """Number of the registered incarnation; 0: none."""
        return self.hello.epoch if self.hello is not None else 0

    @property
    def owns_memory(self) -> bool:
        """Whether the pool's memory belongs to this worker, and is lost with it."""
        return self.hello is None or self.hello.arena_epoch == self.hello.epoch

    def can_follow(self, other: WorkerHandle) -> bool:
        """Whether its step can be planned before the other worker's last one is done: the devices then wait."""
        return other.ready and other.role is self.role and None not in (self.cell, other.cell)

    def pipeline_depth(self, configured: int) -> int:
        """Return the number of plans to have in flight: more where a round trip takes longer than a step."""
        if self.last_step_s <= 0:
            return configured
        return configured + min(_MAX_MORE_PLANS, int(_ROUND_TRIP_S / self.last_step_s))

    def send(self, command: InstanceCommand) -> None:
        """Send a message. If it does not arrive, the worker's silence shows that."""
        self._outbox.send(self.connection, command)

    # --- steps in flight -------------------------------------------------------------------------

    def begin_step(self, step: InflightStep, now: float, not_before: float) -> None:
        """A step is on its way; for ``not_before`` see `DispatchTimer.on_planned`."""
        self.inflight.append(step)
        self.gain.on_planned(now, was_idle=len(self.inflight) == 1)
        self.timing.on_planned(step.work, now, not_before, step.num_passes, step.rounds)

    def misfit(self, result: StepResult) -> str | None:
        """Return why a result is not that of the worker's next step; None: it is. Workers answer in order."""
        number = len(self.results)  # of steps whose results wait
        step = self.inflight[number] if number < len(self.inflight) else None
        if step is None or step.step_id != result.step_id:
            expected = "no step" if step is None else f"step {step.step_id}"
            return f"it answered step {result.step_id}, and {expected} was next"
        num_tokens = len(result.token_ids)
        if num_tokens != step.num_samples:
            return f"it answered step {step.step_id} with {num_tokens} tokens instead of {step.num_samples}"
        if len(result.draft_ids) != step.num_to_draft:
            return (
                f"it answered step {step.step_id} with {len(result.draft_ids)} guesses instead of {step.num_to_draft}"
            )
        if result.more and step.rounds <= 1:
            return f"it answered step {step.step_id} with a round too many"
        is_whole = result.logprobs is None or len(result.logprobs) == num_tokens
        if not is_whole or step.num_scores != [len(tokens) for tokens in result.prompt_logprobs or ()]:
            return f"it answered step {step.step_id} with other log-probabilities than were asked for"
        return None

    def end_step(self, result: StepResult, now: float) -> InflightStep:
        """Confirm and return the oldest step in flight, or a round of it: it then stays in flight."""
        step = self.inflight[0] if result.more else self.inflight.popleft()
        assert step.step_id == result.step_id, "a worker answers in order"
        self.work.num_steps += 1
        self.work.busy_s += result.busy_s
        self.work.host_s += result.host_s
        self.work.add_expert_tokens(result.expert_tokens or [])
        if step.rows:
            self.last_step_s = result.busy_s
        num_passes = step.num_passes
        if step.has_unread:
            self.timing.on_read(result.draft_s, num_passes)
        elif num_passes or not result.draft_s:  # a few tokens that are read say nothing of a pass for guesses
            self.timing.on_drafted(result.draft_s / max(num_passes, 1))
        if result.more:
            self.timing.on_round(now, result.busy_s - result.draft_s, result.early_s, result.draft_s)
        else:
            self.timing.on_confirmed(now, result.busy_s - result.draft_s, result.early_s, result.draft_s)
        return step

    def drop_steps(self) -> list[InflightStep]:
        """Return the steps in flight, which can never be confirmed."""
        steps = list(self.inflight)
        self.inflight.clear()
        return steps
