"""A simulated client: it sends requests, checks every token, and sends open ones again to a new scheduler."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hbserve.messages.client import (
    AbortRequest,
    AddRequest,
    NotReady,
    OutputBatch,
    Ready,
    RequestOutput,
    Resumed,
    SchedulerReply,
    SubscribeReady,
)
from hbserve.sampling_params import SamplingParams
from tests.fault_search.memory import answer_of, scores_of
from tests.fault_search.scenario import VOCAB_SIZE, RequestSpec

if TYPE_CHECKING:
    from tests.fault_search.world import World


@dataclass
class _Request:
    """One request as its client knows it."""

    id: str
    spec: RequestSpec
    expected: list[int]
    began_at: float
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    first_token_at: float | None = None
    is_aborted: bool = False
    end: str | None = None


class Client:
    """One client. It talks to one scheduler at a time, whose number it knows."""

    def __init__(self, world: World, identity: bytes) -> None:
        self.world, self.identity = world, identity
        self.requests: dict[str, _Request] = {}
        self.is_alive = True
        self._is_ready = False
        self._begin_session()

    def _begin_session(self) -> None:
        self.session, self._is_ready = self.world.scheduler.number, False
        self._send(SubscribeReady(deadline_s=1000.0))

    def _send(self, message: AddRequest | AbortRequest | SubscribeReady) -> None:
        self.world.from_client(self.identity, self.session, message)

    def add(self, spec: RequestSpec) -> None:
        if not self.is_alive:
            return
        request_id = f"r{len(self.world.requests)}"
        request = _Request(request_id, spec, answer_of(spec), self.world.now)
        self.requests[request_id] = self.world.requests[request_id] = request
        if self._is_ready:
            self._open(request)

    def _open(self, request: _Request) -> None:
        spec, now = request.spec, self.world.now
        resumed, first_at = None, request.first_token_at
        predicted = None
        if spec.wrong_guesses is not None:
            rng = random.Random(spec.seed)
            predicted = [
                rng.randrange(VOCAB_SIZE) if rng.random() < spec.wrong_guesses else t for t in request.expected
            ]
        if request.tokens or request.scores:
            age_s = None if first_at is None else now - first_at
            num_scored = len(request.scores)
            resumed = Resumed(token_ids=list(request.tokens), num_scored=num_scored, first_token_age_s=age_s)
        sampling = SamplingParams(
            max_tokens=spec.max_tokens,
            seed=spec.seed,
            repetition_penalty=1.5 if spec.keeps_state else 1.0,
            grammar="start: /a/" if spec.late_masks else None,
            cache_salt=spec.salt,
            ttft_ms=spec.ttft_ms,
            tpot_ms=spec.tpot_ms,
            priority="batch" if spec.is_batch else None,
            prompt_logprobs=0 if spec.scores_prompt else None,
        )
        self._send(
            AddRequest(
                request_id=request.id,
                prompt_token_ids=list(spec.prompt),
                end_token_ids=[] if spec.end_token is None else [spec.end_token],
                sampling=sampling,
                age_s=now - request.began_at,
                resumed=resumed,
                predicted_token_ids=predicted,
            )
        )
        if request.is_aborted:
            self._send(AbortRequest(request_id=request.id))

    def abort(self, request: _Request) -> None:
        if self.is_alive and request.end is None and not request.is_aborted:
            request.is_aborted = True
            if self._is_ready:
                self._send(AbortRequest(request_id=request.id))

    def on_new_scheduler(self) -> None:
        if self.is_alive:
            self._begin_session()

    def on_reply(self, session: int, reply: SchedulerReply) -> None:
        if not self.is_alive or session != self.session:
            return
        match reply:
            case Ready() if not self._is_ready:
                self._is_ready = True
                for request in self.requests.values():
                    if request.end is None:
                        self._open(request)
            case NotReady(reason=reason):
                raise self.world.fault(f"client {self.identity!r} was told: {reason}")
            case OutputBatch(outputs=outputs):
                for output in outputs:
                    self._on_output(output)

    def _on_output(self, output: RequestOutput) -> None:
        world, request = self.world, self.requests[output.request_id]
        if request.end is not None:
            raise world.fault(f"{request.id} got {output} after its end, {request.end}")
        if output.prompt_logprobs is not None:
            request.scores += [each.token for each in output.prompt_logprobs]
            expected_scores = scores_of(request.spec.prompt)
            if request.scores != expected_scores[: len(request.scores)]:
                raise world.fault(f"{request.id} got log-probabilities {request.scores}, not {expected_scores}")
        if output.token_ids and request.spec.scores_prompt and len(request.scores) + 1 != len(request.spec.prompt):
            raise world.fault(f"{request.id} got a token, but only {len(request.scores)} log-probabilities before")
        begin = len(request.tokens)
        request.tokens += output.token_ids
        if output.token_ids and request.first_token_at is None:
            request.first_token_at = world.now
        if request.tokens[begin:] != request.expected[begin : len(request.tokens)]:
            expected = request.expected[begin : begin + len(output.token_ids)]
            raise world.fault(f"{request.id} got {output.token_ids} after {begin} tokens, not {expected}")
        if output.finish_reason is None:
            return
        request.end = output.finish_reason
        world.trace(f"{request.id} ends: {output.finish_reason} {output.error or ''}")
        is_whole = request.tokens == request.expected
        if output.error_kind == "UnservedError" and world.has_lost_a_phase:
            return
        if output.finish_reason == "error":
            raise world.fault(f"{request.id} failed: {output.error}")
        if output.finish_reason == "abort" and not request.is_aborted:
            raise world.fault(f"{request.id} was aborted by nobody")
        if output.finish_reason in ("stop", "length") and not is_whole:
            raise world.fault(f"{request.id} ended with {len(request.tokens)} of {len(request.expected)} tokens")

    def die(self) -> None:
        """Vanish: the scheduler learns it when it next sends something here."""
        self.is_alive = False
        for request in self.requests.values():
            request.end = request.end or "its client has gone"
