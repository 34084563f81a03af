"""The order of prompts: of the waiting queue, and of the prompts that have a KV allocation.

Runs in the scheduler's process, and on the simulator's clock. Best-effort prompts (``priority: batch``) come last under
every policy.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sized
from collections.abc import Sequence as Items
from typing import Protocol, TypeVar

from hbserve.config import SchedulerConfig
from hbserve.policy.passing_order import PassingOrder
from hbserve.policy.step_time_predictor import StepTimePredictor

_RESUMED, _NEW, _BATCH = 0, 1, 2
SAFETY_FACTOR = 1.05
"""Factor on predicted durations. Under overload each request is served at the last moment, so errors cost deadlines."""
_STEPS_WAITED = 0.5
"""Mean share of the step under way that a prompt waits for."""
_HORIZON = 256
"""Number of prompts at the head of a long queue that are looked at; the others are far from being served."""
_DEFAULT_TTFT_MS = 10_000.0
"""Time after which a request without a target has its turn; used for the order only."""
OVERDUE_TARGETS = 8.0
"""Multiple of its TTFT target after which a prompt has a part in the guaranteed share."""
_MIN_OVERDUE_S = 1.0
"""Shortest such time: an impossible target is no way to it."""
OVERDUE_SHARE = 0.1
"""Share of prefill's time that overdue prompts get, however many others could still keep their targets."""
_MAX_OWED_S = 1.0
_NUM_TARGETS = 64
"""Arrivals whose targets count as those of the requests that may come next."""

Rank = tuple[int, float, float]


class Prompt(Protocol):
    """A request as a policy sees it; see `hbserve.scheduler.sequence.Sequence`."""

    rank: Rank

    @property
    def tokens(self) -> Sized:
        """Tokens to compute."""

    @property
    def expected_cached_tokens(self) -> int:
        """Leading tokens that were cached when the request began to wait."""

    @property
    def alike(self) -> Prompt | None:
        """An earlier prompt that begins alike; None: there was none that was being computed."""

    @property
    def num_alike_tokens(self) -> int:
        """Leading tokens that both have, in whole KV blocks."""

    @property
    def arrival(self) -> float:
        """Serial number, growing with every request."""

    @property
    def arrival_time(self) -> float:
        """Seconds."""

    @property
    def first_token_time(self) -> float | None:
        """Time of the first token that its client got, if it got one."""

    @property
    def ttft_target_ms(self) -> float | None:
        """TTFT target of the request, if it came with one."""

    @property
    def is_batch(self) -> bool:
        """Whether the request is best-effort."""


_Prompt = TypeVar("_Prompt", bound=Prompt)
Admitted = Callable[[], tuple[Items[tuple[Prompt, int]], int]]
"""Returns the prompts, with the number of their tokens computed or planned, and the number of workers for them."""


class QueuePolicy:
    """First come, first served.

    A request's rank is fixed when it begins to wait, so that a sorted queue stays sorted. Preempted requests whose
    client has tokens already go first.
    """

    def rank(self, sequence: Prompt) -> Rank:
        """Compute the rank of a sequence that begins to wait now; the smallest goes first."""
        return _BATCH if sequence.is_batch else _NEW, sequence.arrival_time, sequence.arrival

    def on_waiting(self, sequence: Prompt) -> None:
        """Note that a sequence begins to wait."""

    def order(self, waiting: list[_Prompt], now: float, admitted: Admitted) -> Items[_Prompt]:
        """Put a queue that is sorted by rank in the order of admission.

        Args:
            admitted: says which prompts have an allocation and are not yet computed.
        """
        return waiting

    def key(self, sequence: Prompt, num_computed: int, now: float) -> tuple[int, Rank]:
        """Compute the sort key of a prompt that could be computed now; the smallest goes first.

        Args:
            num_computed: tokens of it that are computed already.
        """
        return 0, sequence.rank

    def has_missed_target(self, sequence: Prompt, now: float) -> bool:
        """Whether a sequence has missed its target, so that others do not wait for it."""
        return False

    def gives_way(self, sequence: Prompt, now: float) -> bool:
        """Whether a waiting sequence leaves memory for others that may come."""
        return sequence.is_batch

    @property
    def tightest_ttft_s(self) -> float:
        """The tightest TTFT target among the last arrivals; infinite: there is none, or the order does not heed it."""
        return math.inf

    def on_planned(self, sequence: Prompt, num_tokens: int, start: int, now: float) -> None:
        """Note that tokens of a prompt have been planned, after ``start`` others of it."""


class ShortestPromptFirst(QueuePolicy):
    """Fewest tokens first; each second of waiting counts as ``ageing_tokens_per_s`` tokens less.

    All prompts age alike, so the time of arrival stands for the age, and ranks do not change.
    """

    def __init__(self, ageing_tokens_per_s: float) -> None:
        self._ageing = ageing_tokens_per_s

    def rank(self, sequence: Prompt) -> Rank:
        length = len(sequence.tokens) + self._ageing * sequence.arrival_time
        return _group(sequence), length, sequence.arrival


_HAS_TURN, _IN_TIME, _DEFERRED, _LATE, _LAST = range(-1, 4)


class SloAware(QueuePolicy):
    """Earliest TTFT deadline first, without the prompts that would make others late: as many as possible in time.

    This is the rule of Moore and Hodgson (Moore, Management Science 15, 1968), which keeps the most deadlines on one
    machine. It goes through the prompts by deadline, admitted ones included. At each deadline that cannot be kept, it
    defers one of the prompts up to there: the one with the most left to compute. Deferred prompts are computed when the
    others leave time. Least laxity would, under overload, serve the prompts that are about to be late, until all are.

    Without targets nothing is deferred, and the order is that of arrival. If targets are a guess, nothing is deferred
    either, because a deferred request would pay for the guess; the order is then a `PassingOrder`. While some of the
    last requests have targets of their own, guessed targets are deadlines like these.

    No prompt starves. A prompt that has waited for `OVERDUE_TARGETS` times its target, and for a second, is *overdue*.
    Overdue prompts get `OVERDUE_SHARE` of the time in which prompts are computed. An account holds how much of that
    they are owed. While it is positive, the overdue prompt with the earliest deadline goes before all others.

    A beginning that prompts have in common is computed once (`hbserve.kv_cache.block_pool`). So a prompt takes only the
    time of its own part, if an earlier prompt with that beginning is not deferred. To defer the earlier prompt saves
    only the time of its own part.

    Args:
        predictor: of steps with prompts, at all workers that take prompts from this queue.
        default_ttft_ms: target of requests that come without one.
        soft_target_ms: returns a guess of that target, by the number of prompt tokens; None: it is no guess.
    """

    def __init__(
        self,
        predictor: StepTimePredictor,
        default_ttft_ms: float | None,
        soft_target_ms: Callable[[int], float | None] | None = None,
    ) -> None:
        self._predictor = predictor
        self._default_ttft_ms = default_ttft_ms
        self._soft_target_ms = soft_target_ms
        self._num_since_target = _NUM_TARGETS  # arrivals since the last one with a target that is no guess
        self._passing_order: PassingOrder[Prompt] = PassingOrder()
        self._places: dict[Prompt, int] = {}  # in that order
        self._deferred: set[Prompt] = set()  # admitted ones included
        self._counted: set[Prompt] = set()  # whose beginnings others need not compute
        self._owed_s = 0.0  # to overdue prompts
        self._overdue: Prompt | None = None  # the one whose deadline was first
        self._targets_ms: deque[float] = deque(maxlen=_NUM_TARGETS)  # of the last arrivals; infinite: none
        self._has_targets = False

    def rank(self, sequence: Prompt) -> Rank:
        if self._passes:
            return _group(sequence), sequence.arrival_time, sequence.arrival
        due = sequence.arrival_time + (self._target_ms(sequence) or _DEFAULT_TTFT_MS) / 1000
        return _group(sequence), due, sequence.arrival

    @property
    def _passes(self) -> bool:
        """Whether all targets are a guess, so that the order is a `PassingOrder`."""
        return self._soft_target_ms is not None and not self._has_targets

    def on_waiting(self, sequence: Prompt) -> None:
        """See `QueuePolicy.on_waiting`. Its target counts as that of requests that may come next."""
        if not sequence.is_batch:
            target_ms = self._target_ms(sequence)
            self._targets_ms.append(math.inf if target_ms is None else target_ms)
            is_guess = self._soft_target_ms is not None and sequence.ttft_target_ms is None
            self._num_since_target = self._num_since_target + 1 if target_ms is None or is_guess else 0
            self._has_targets = self._num_since_target < _NUM_TARGETS

    def _target_ms(self, sequence: Prompt) -> float | None:
        if sequence.is_batch:
            return None
        if sequence.ttft_target_ms is not None:
            return sequence.ttft_target_ms
        return self._default_ttft_ms if self._soft_target_ms is None else self._soft_target_ms(len(sequence.tokens))

    @property
    def tightest_ttft_s(self) -> float:
        """See `QueuePolicy.tightest_ttft_s`."""
        return min(self._targets_ms, default=math.inf) / 1000

    # --- the order -------------------------------------------------------------------------------

    def order(self, waiting: list[_Prompt], now: float, admitted: Admitted) -> Items[_Prompt]:
        if not self._has_targets:
            self._deferred, self._counted, self._overdue = set(), set(), None
            return self._pass(waiting, now, admitted) if self._passes else waiting
        allocations, num_workers = admitted()
        # Resumed ones, late ones, others and best-effort ones stand in this order.
        late, others, batch = (
            bisect.bisect_left(waiting, rank, key=lambda sequence: sequence.rank[: len(rank)])
            for rank in ((_NEW,), (_NEW, now), (_BATCH,))
        )
        looked_at = [*waiting[:late], *waiting[others : min(others + _HORIZON, batch)]]
        prompts: list[tuple[Prompt, int]] = [*allocations, *((sequence, 0) for sequence in looked_at)]
        self._counted = set()
        self._deferred = deferred = self._defer(prompts, now, num_workers) if len(prompts) > 1 else set()
        self._find_overdue([*(sequence for sequence, _ in allocations), *waiting[late : late + _HORIZON]], now)
        if late == others and deferred.isdisjoint(looked_at):
            return waiting
        in_time = [sequence for sequence in waiting[others:batch] if sequence not in deferred]
        ordered = [*waiting[:late], *in_time, *(s for s in looked_at if s in deferred), *waiting[late:others]]
        first = self._overdue
        if first is not None and self._owed_s > 0 and first in ordered:
            ordered.sort(key=lambda sequence: sequence is not first)
        return ordered + waiting[batch:]

    def _pass(self, waiting: list[_Prompt], now: float, admitted: Admitted) -> Items[_Prompt]:
        first, batch = (bisect.bisect_left(waiting, group, key=lambda s: s.rank[0]) for group in (_NEW, _BATCH))
        end = min(first + _HORIZON, batch)
        allocations, num_workers = admitted()
        prompts: list[tuple[Prompt, int]] = [item for item in allocations if item[0].rank[0] == _NEW]
        prompts += [(sequence, 0) for sequence in waiting[first:end]]
        prompts.sort(key=lambda item: item[0].rank)
        self._counted = {sequence for sequence, _ in prompts}
        left = [(sequence, sequence.arrival_time, self._prompt_s(sequence, n) / num_workers) for sequence, n in prompts]
        self._places = {sequence: place for place, sequence in enumerate(self._passing_order.order(left, now))}
        return [*waiting[:first], *sorted(waiting[first:end], key=self._places.__getitem__), *waiting[end:]]

    def _defer(self, prompts: list[tuple[Prompt, int]], now: float, num_workers: int) -> set[Prompt]:
        end = now + _STEPS_WAITED * self._predictor.step_s
        chosen: list[tuple[float, float, Prompt]] = []  # a heap, most to compute first: (-seconds, arrival, prompt)
        own_s: dict[Prompt, float] = {}  # of those that others begin like: the time of what is theirs alone
        deferred = set()
        for sequence, num_computed in sorted(prompts, key=lambda item: item[0].rank):
            group, deadline, arrival = sequence.rank
            if group == _BATCH:
                break
            seconds = self._left_s(sequence, num_computed)
            end += seconds / num_workers
            for other, num_tokens in _alike(sequence):
                if other in self._counted:
                    rest_s = SAFETY_FACTOR * self._predictor.prompt_s(len(other.tokens) - num_tokens, num_tokens)
                    own_s[other] = min(own_s.get(other, math.inf), rest_s)
            self._counted.add(sequence)
            if group == _NEW:
                heapq.heappush(chosen, (-seconds, -arrival, sequence))
                if end + seconds * (1 - 1 / num_workers) > deadline:  # one worker computes it, not all of them
                    seconds, arrival, longest = heapq.heappop(chosen)
                    while -seconds > own_s.get(longest, math.inf):
                        seconds, arrival, longest = heapq.heappushpop(chosen, (-own_s[longest], arrival, longest))
                    deferred.add(longest)
                    if longest not in own_s:
                        self._counted.discard(longest)
                    end += seconds / num_workers
        return deferred

    def _find_overdue(self, late: Items[Prompt], now: float) -> None:
        """Find the overdue prompt whose deadline was first."""
        overdue = (sequence for sequence in late if self._is_overdue(sequence, now))
        self._overdue = min(overdue, key=lambda sequence: sequence.rank, default=None)
        if self._overdue is None:
            self._owed_s = 0.0

    def _is_overdue(self, sequence: Prompt, now: float) -> bool:
        group, deadline, _ = sequence.rank
        wait_s = deadline - sequence.arrival_time
        if self._target_ms(sequence) is not None:
            wait_s = max(OVERDUE_TARGETS * wait_s, _MIN_OVERDUE_S)
        return group == _NEW and now - sequence.arrival_time > wait_s

    def on_planned(self, sequence: Prompt, num_tokens: int, start: int, now: float) -> None:
        """See `QueuePolicy.on_planned`. Overdue prompts earn a share of the time, and pay with it."""
        if self._overdue is not None:
            seconds = self._predictor.prompt_s(num_tokens, start)
            self._owed_s = min(self._owed_s + OVERDUE_SHARE * seconds, _MAX_OWED_S)
            if self._is_overdue(sequence, now):
                self._owed_s -= seconds

    def _prompt_s(self, sequence: Prompt, num_computed: int) -> float:
        start = num_computed or sequence.expected_cached_tokens
        for other, num_tokens in _alike(sequence):
            if other in self._counted or other.first_token_time is not None:
                start = max(start, num_tokens)
                break
        return self._predictor.prompt_s(max(0, len(sequence.tokens) - start), start)

    def _left_s(self, sequence: Prompt, num_computed: int) -> float:
        return SAFETY_FACTOR * self._prompt_s(sequence, num_computed)

    def key(self, sequence: Prompt, num_computed: int, now: float) -> tuple[int, Rank]:
        """See `QueuePolicy.key`. Prompts that can be in time go before deferred ones, and these before late ones."""
        group, deadline, arrival = rank = sequence.rank
        if group == _NEW and self._passes:
            place = self._places.get(sequence)  # None: it is beyond the horizon
            return (_DEFERRED, rank) if place is None else (_IN_TIME, (group, place, arrival))
        if not self._has_targets or group != _NEW:
            return _IN_TIME if group != _BATCH else _LAST, rank
        if sequence is self._overdue and self._owed_s > 0:
            return _HAS_TURN, rank
        seconds = self._left_s(sequence, num_computed) + _STEPS_WAITED * self._predictor.step_s
        if now + seconds > deadline:
            return _LATE, rank
        return _DEFERRED if sequence in self._deferred else _IN_TIME, rank

    def gives_way(self, sequence: Prompt, now: float) -> bool:
        """See `QueuePolicy.gives_way`. Late prompts do, except for the one that has its turn."""
        return self.key(sequence, 0, now)[0] >= _LATE

    def has_missed_target(self, sequence: Prompt, now: float) -> bool:
        target_ms = self._target_ms(sequence)
        return sequence.rank[0] == _NEW and target_ms is not None and now > sequence.arrival_time + target_ms / 1000


def make_policy(
    config: SchedulerConfig, predictor: StepTimePredictor, controller_ttft_ms: float | None = None
) -> QueuePolicy:
    """Make the configured policy.

    Args:
        predictor: that of `SloAware`.
        controller_ttft_ms: target of an SLO controller, for requests if the configuration has no other one for them.
    """
    if config.policy == "shortest_prompt_first":
        return ShortestPromptFirst(config.ageing_tokens_per_s)
    if config.policy == "slo_aware":
        soft_target_ms = config.ttft_target_ms if config.targets_are_soft and config.ttft_ms is not None else None
        return SloAware(predictor, config.ttft_ms or controller_ttft_ms, soft_target_ms)
    return QueuePolicy()


def _alike(sequence: Prompt) -> Iterator[tuple[Prompt, int]]:
    """Yield the earlier prompts that a prompt begins like, each with how many tokens they have in common."""
    num_tokens = sequence.num_alike_tokens
    while (other := sequence.alike) is not None:
        num_tokens = min(num_tokens, sequence.num_alike_tokens)
        yield other, num_tokens
        sequence = other


def _group(sequence: Prompt) -> int:
    if sequence.is_batch:
        return _BATCH
    return _NEW if sequence.first_token_time is None else _RESUMED
