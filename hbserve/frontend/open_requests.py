"""The open requests of a client: what it has of each, which go to the scheduler now, and which one may kill it.

A scheduler keeps requests in its memory only. When it ends, the client sends its open requests to the next one, each
with the tokens that are here. If a scheduler *fails*, one of the requests may be the cause, and would end the next one
too. `OpenRequests` finds that request and gives it up, so that the others go on:

1.  A request that was with a scheduler when it failed counts that, unless it had gained `_TOKENS_TO_FORGIVE` tokens.
2.  A request that counts `_MAX_FAILURES` is a suspect. All others are sent at once, and a moment later one suspect: it
    is *on trial*. Nothing else is sent until the trial has ended.
3.  The trial ends well with those tokens, or with the request. If the scheduler fails during the trial, the request is
    given up.

A scheduler that was killed from outside has not failed, and counts against no request.

Pure: no sockets and no clock. Runs in the client's event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from hbserve.errors import HBServeError
from hbserve.messages.client import AddRequest, RequestOutput, Resumed

OutputSink = Callable[[RequestOutput | HBServeError], None]

_TOKENS_TO_FORGIVE = 16
_MAX_FAILURES = 2
_TRIAL_DELAY_S = 1.0
"""Time in which requests that are no suspects get tokens, so that a failed trial does not make suspects of them."""
_MAX_TRIAL_S = 30.0
"""A request that waits for a place at the scheduler for longer holds up no others."""


@dataclass(eq=False, slots=True)
class OpenRequest:
    """A request that has not ended.

    Attributes:
        opened_at: since when it waits for its first token, on the monotonic clock; `first_token_at` likewise.
        token_ids: output tokens that are here.
        num_scored: prompt tokens whose log-probabilities are here.
        is_sent: the present scheduler has it.
        was_sent: a scheduler had it.
        num_failures: failures of schedulers that count against it.
        end_reason: finish reason of the end that was asked for; None: it was not.
    """

    request: AddRequest
    sink: OutputSink
    opened_at: float
    token_ids: list[int] = field(default_factory=list)
    num_scored: int = 0
    first_token_at: float | None = None
    is_sent: bool = False
    was_sent: bool = False
    num_failures: int = 0
    end_reason: str | None = None
    _is_affected: bool = False
    _num_tokens_when_sent: int = 0

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_gained(self) -> int:
        """Tokens that have come since it was sent."""
        return len(self.token_ids) - self._num_tokens_when_sent

    def note(self, output: RequestOutput, now: float) -> None:
        """Note what has come."""
        if output.token_ids:
            if self.first_token_at is None:
                self.first_token_at = now
            self.token_ids += output.token_ids
        elif output.prompt_logprobs is not None:
            self.num_scored += len(output.prompt_logprobs)

    def to_message(self, now: float) -> AddRequest:
        """Return the message that has the present scheduler go on with the request."""
        resumed = None
        if self.was_sent:
            age_s = None if self.first_token_at is None else now - self.first_token_at
            resumed = Resumed(token_ids=self.token_ids, num_scored=self.num_scored, first_token_age_s=age_s)
        self.is_sent = self.was_sent = True
        self._num_tokens_when_sent = len(self.token_ids)
        return msgspec.structs.replace(self.request, age_s=max(0.0, now - self.opened_at), resumed=resumed)

    def on_scheduler_lost(self) -> None:
        """The scheduler has ended, or cannot be reached any more."""
        self._is_affected = self._is_affected or self.is_sent
        self.is_sent = False

    def on_scheduler_back(self, has_failed: bool) -> None:
        """There is a scheduler again; ``has_failed``: because the last one failed."""
        if self._is_affected and has_failed:
            self.num_failures = 0 if self.num_gained >= _TOKENS_TO_FORGIVE else self.num_failures + 1
        self._is_affected = False


class OpenRequests:
    """All open requests of a client, in the order in which they were opened."""

    def __init__(self) -> None:
        self._open: dict[str, OpenRequest] = {}
        self._held: dict[str, OpenRequest] = {}  # those of them that the present scheduler does not have
        self._on_trial: OpenRequest | None = None
        self._on_trial_until = 0.0
        self._trials_from = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def __iter__(self) -> Iterator[OpenRequest]:
        return iter(self._open.values())

    def get(self, request_id: str) -> OpenRequest | None:
        """Return an open request."""
        return self._open.get(request_id)

    def add(self, request: OpenRequest) -> None:
        """Add a new request; `take_sendable` returns it when it is its turn."""
        self._open[request.id] = self._held[request.id] = request

    def pop(self, request_id: str) -> OpenRequest | None:
        """Remove a request that has ended; returns None if it is not open."""
        request = self._open.pop(request_id, None)
        self._held.pop(request_id, None)
        if request is not None and request is self._on_trial:
            self._on_trial = None
        return request

    def pop_all(self) -> list[OpenRequest]:
        """Remove all requests."""
        requests, self._on_trial = list(self._open.values()), None
        self._open.clear()
        self._held.clear()
        return requests

    @property
    def has_held(self) -> bool:
        """Whether the present scheduler does not have all of them."""
        return bool(self._held)

    def on_scheduler_lost(self) -> list[OpenRequest]:
        """The scheduler is lost; removes and returns requests whose end was asked for: nothing is left to wait for."""
        for request in self._open.values():
            request.on_scheduler_lost()
        self._held = dict(self._open)
        ended = [request for request in self._open.values() if request.end_reason is not None]
        for request in ended:
            self.pop(request.id)
        return ended

    def on_scheduler_back(self, has_failed: bool, now: float) -> OpenRequest | None:
        """There is a scheduler again; removes and returns the request that must not be sent to it.

        Args:
            has_failed: the scheduler before it failed on its own.
        """
        given_up, self._on_trial = self._on_trial, None
        self._trials_from = now + _TRIAL_DELAY_S
        for request in self._open.values():
            request.on_scheduler_back(has_failed)
        if given_up is None or not has_failed or given_up.num_failures <= _MAX_FAILURES:
            return None
        return self.pop(given_up.id)

    def take_sendable(self, now: float) -> tuple[list[OpenRequest], float | None]:
        """Return the requests to send now; and in how many seconds more can be sent at the latest, None: any time."""
        trial = self._on_trial
        if trial is not None and now < self._on_trial_until and trial.num_gained < _TOKENS_TO_FORGIVE:
            return [], self._on_trial_until - now
        self._on_trial = None
        free = [request for request in self._held.values() if request.num_failures < _MAX_FAILURES]
        for request in free:
            del self._held[request.id]
        if not self._held:
            return free, None
        if free or now < self._trials_from:
            return free, max(0.0, self._trials_from - now)
        self._on_trial = self._held.pop(next(iter(self._held)))
        self._on_trial_until = now + _MAX_TRIAL_S
        return [self._on_trial], _MAX_TRIAL_S
