"""The speculator of one sequence: its drafters, and how often each of them was right."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from hbserve.config import SpeculationConfig
from hbserve.messages.client import AddRequest
from hbserve.speculation.drafters import Drafter, NgramDrafter, PredictionDrafter

_FIRST_ACCEPTED, _FIRST_TRIED = 1.4, 2.0
"""What a drafter has to its credit at first: an acceptance of 0.7 that a few steps can change."""
_MEMORY = 0.9
"""Weight of the past at each step: about the last ten drafts count."""
_HOPELESS = 0.2
"""Acceptance below which a drafter gets only a probe now and then."""
_FIRST_PAUSE_TOKENS = 32
_MAX_PAUSE_TOKENS = 1024


def accepted_tokens(draft: Items[int], sampled: Items[int]) -> list[int]:
    """Return the tokens that a row with a draft has brought.

    The sampling noise depends on seed and position alone. So a sampled token is the sequence's own if and only if all
    tokens before it are. The token after the last right draft token is always one of them.

    Args:
        draft: k tokens. sampled: k + 1 tokens, the i-th at the place of draft token i.
    """
    for index, token in enumerate(draft):
        if sampled[index] != token:
            return list(sampled[: index + 1])
    return list(sampled)


@dataclass(slots=True)
class Record:
    """How often a drafter was right for one sequence, with more weight on recent drafts.

    Attributes:
        accepted, tried: draft tokens, weighted. A token behind a wrong one was not tried.
        pause_tokens: length of the next pause, if a probe fails.
        paused_until: number of tokens of the sequence at which it may be tried again.
    """

    accepted: float = _FIRST_ACCEPTED
    tried: float = _FIRST_TRIED
    pause_tokens: int = _FIRST_PAUSE_TOKENS
    paused_until: int = 0

    @property
    def acceptance(self) -> float:
        """Probability that a draft token is right if those before it are."""
        return self.accepted / self.tried

    @property
    def is_hopeless(self) -> bool:
        """Whether only probes of one token are tried."""
        return self.acceptance < _HOPELESS

    def add(self, num_drafted: int, num_accepted: int, num_tokens: int) -> None:
        """Note the result of a draft; ``num_tokens``: of the sequence after it."""
        self.accepted = _MEMORY * self.accepted + num_accepted
        self.tried = _MEMORY * self.tried + min(num_accepted + 1, num_drafted)
        if not self.is_hopeless:
            self.pause_tokens = _FIRST_PAUSE_TOKENS
        elif num_accepted < num_drafted:
            self.paused_until = num_tokens + self.pause_tokens
            self.pause_tokens = min(2 * self.pause_tokens, _MAX_PAUSE_TOKENS)


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens, and the record of the drafter that made them."""

    token_ids: list[int]
    drafter: str
    record: Record

    def first(self, num_tokens: int) -> Draft:
        """Return the draft, cut to so many tokens."""
        return Draft(self.token_ids[:num_tokens], self.drafter, self.record)


class Speculator:
    """The drafters of one sequence, best first by what was accepted.

    Args:
        drafters: in the order in which they are asked while nothing is known of them.
        max_draft_tokens: of a draft.
    """

    def __init__(self, drafters: Items[Drafter], max_draft_tokens: int) -> None:
        self._drafters = [(drafter, Record()) for drafter in drafters]
        self._max_draft_tokens = max_draft_tokens

    def draft(self, tokens: Items[int], max_tokens: int) -> Draft | None:
        """Guess the tokens after ``tokens``, the sequence's so far; None: no drafter has a guess worth a try."""
        max_tokens = min(max_tokens, self._max_draft_tokens)
        if max_tokens <= 0:
            return None
        drafters = self._drafters
        if len(drafters) > 1:
            drafters = sorted(drafters, key=lambda item: -item[1].acceptance)
        for drafter, record in drafters:
            if record.paused_until > len(tokens):
                continue
            token_ids = drafter.draft(tokens, 1 if record.is_hopeless else max_tokens)
            if token_ids:
                return Draft(token_ids, drafter.name, record)
        return None


class Speculation:
    """Makes the speculators of a scheduler's sequences, as configured."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config

    def begin(self, request: AddRequest) -> Speculator | None:
        """Return the speculator of a request that has just come; None: nothing guesses its tokens."""
        drafters: list[Drafter] = []
        if request.predicted_token_ids:
            drafters.append(PredictionDrafter(request.predicted_token_ids, len(request.prompt_token_ids)))
        if self._config.method == "ngram":
            drafters.append(NgramDrafter())
        return Speculator(drafters, self._config.max_draft_tokens) if drafters else None
