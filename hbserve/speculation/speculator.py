"""The speculator of one sequence: its drafters, and how often each of them was right."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from hbserve.config import SpeculationConfig
from hbserve.messages.client import AddRequest
from hbserve.messages.worker import TO_BE_DRAFTED
from hbserve.speculation.drafters import (
    DRAFT_MODEL,
    EAGLE3,
    MAX_TOKENS_PER_CALL,
    Drafter,
    GrammarDrafter,
    ModelDrafter,
    NgramDrafter,
    PredictionDrafter,
)
from hbserve.speculation.rounds import MAX_ROUNDS, next_guesses
from hbserve.speculation.suffixes import OutputPools, SuffixDrafter

_FIRST_ACCEPTANCE_OF_MODEL = 0.75
"""Expected of a draft model at first: it must be tried before it shows anything."""
_FIRST_ACCEPTANCE_OF_GRAMMAR = 0.98
_FIRST_ACCEPTANCE_OF_TEXT = 0.5
"""The same of the others. To watch their guesses costs nothing, so doubt costs a few tokens, and trust costs steps."""
_FIRST_TRIED = 4.0
"""Guesses that a drafter has to its credit, as often right as those of other sequences."""
_MEMORY = 0.97
"""Weight of the past at each guess: about the last thirty count."""
_MEMORY_OF_ALL = 0.998
"""The same over all sequences; ``_MEMORY_OF_MODEL``: of a draft model, of which every guess costs time."""
_MEMORY_OF_MODEL = 0.99
_FORGETTING = 0.01
"""Part of what all sequences have shown that a new one forgets: a drafter that was wrong is tried again some time."""
_FORGETTING_OF_MODEL = 2e-4
"""The same for each sequence and step without a guess of the draft model."""


@dataclass(slots=True)
class Acceptance:
    """How often the drafters of one name were right, over all sequences."""

    first: float = _FIRST_ACCEPTANCE_OF_TEXT
    memory: float = _MEMORY_OF_ALL
    is_of_model: bool = False
    value: float = field(init=False)

    def __post_init__(self) -> None:
        self.value = self.first

    def begin(self) -> Acceptance:
        """Note that there is a new sequence."""
        self.forget(_FORGETTING)
        return self

    def forget(self, part: float) -> None:
        """Forget a part of what was shown."""
        self.value += part * (self.first - self.value)

    def add(self, is_right: bool) -> None:
        """Count a guess."""
        memory = self.memory
        self.value = memory * self.value + (1 - memory) * is_right


@dataclass(slots=True)
class Record:
    """How often a drafter was right for one sequence, with more weight on recent guesses.

    Every guess counts, whether a step has verified it or not: the sequence's own tokens tell, as they come. So a
    drafter that gets better is noticed, and one that gets worse costs nothing to watch.

    Attributes:
        right, tried: guessed tokens, weighted. A token behind a wrong one was not tried.
        credit: weight of what the drafters of this name have shown for all sequences.
        guess: the last guess, after ``num_known`` tokens of the sequence.
        of_all: the acceptance of all drafters of this name; expected: its value at the sequence's last token.
    """

    right: float = 0.0
    tried: float = 0.0
    credit: float = _FIRST_TRIED
    guess: list[int] = field(default_factory=list)
    num_known: int = 0
    of_all: Acceptance = field(default_factory=Acceptance)
    expected: float = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self.of_all.value

    @property
    def acceptance(self) -> float:
        """Probability that a guessed token is right if those before it are: as for this sequence, and a little as for
        all. So sequences that have tried nothing yet learn from those that have.
        """
        return (self.right + self.credit * self.expected) / self.weight

    @property
    def weight(self) -> float:
        """Number of guesses that `acceptance` is computed from."""
        return self.tried + self.credit

    @property
    def max_rounds(self) -> int:
        """Rounds that a step may do with this drafter's guesses: one, and one more for each recent right guess.

        The scheduler cannot stop a step between its rounds. So a drafter that has been right for other sequences alone
        gets one round, which costs little if it is wrong for this one.
        """
        return 1 + int(self.right)

    @property
    def must_be_tried(self) -> bool:
        """Whether its guesses are known only if they are tried."""
        return self.of_all.is_of_model

    def settle(self, tokens: Items[int]) -> None:
        """Compare the last guess with the tokens that have come since."""
        if not self.guess or len(tokens) == self.num_known:
            return
        for guessed, token in zip(self.guess, tokens[self.num_known : self.num_known + len(self.guess)], strict=False):
            self.tried = _MEMORY * self.tried + 1
            self.right *= _MEMORY
            self.credit *= _MEMORY
            self.of_all.add(guessed == token)
            if guessed != token:
                break
            self.right += 1
        self.guess = []


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens, and the name and the record of the drafter that made them.

    The guesses of a draft model are `TO_BE_DRAFTED` until the step's result is there.

    Attributes:
        ahead: guesses of the tokens after these, for later rounds (`hbserve.speculation.rounds`).
    """

    token_ids: list[int]
    drafter: str
    record: Record
    ahead: list[int] = field(default_factory=list)

    @property
    def num_to_draft(self) -> int:
        """Number of guesses that the worker's draft model makes: all, or none."""
        return len(self.token_ids) if self.drafter in ModelDrafter.names else 0

    def first(self, num_tokens: int) -> Draft:
        """Return the draft, cut to so many tokens."""
        ahead = [*self.token_ids[num_tokens:], *self.ahead]
        return Draft(self.token_ids[:num_tokens], self.drafter, self.record, ahead)

    def after(self, num_tokens: int) -> Draft:
        """Return the draft of the next round, behind so many tokens that this one has brought."""
        if self.num_to_draft:
            return Draft([TO_BE_DRAFTED] * self.num_to_draft, self.drafter, self.record)
        token_ids, ahead = next_guesses(self.token_ids, self.ahead, num_tokens)
        return Draft(token_ids, self.drafter, self.record, ahead)

    def made(self, token_ids: list[int], tokens: Items[int]) -> Draft:
        """Return the draft with a draft model's guesses of the tokens after ``tokens``, the sequence's so far."""
        self.record.settle(tokens)
        self.record.guess, self.record.num_known = token_ids, len(tokens)
        return Draft(token_ids, self.drafter, self.record)


class Speculator:
    """The drafters of one sequence; the one that was right most often makes the draft.

    Args:
        drafters: the first of equals wins.
        max_draft_tokens: of a draft.
        acceptances: by name, of these drafters over all sequences; missing ones are added.
    """

    def __init__(
        self, drafters: Items[Drafter], max_draft_tokens: int, acceptances: dict[str, Acceptance] | None = None
    ) -> None:
        of_all = {} if acceptances is None else acceptances
        self._drafters = [
            (drafter, Record(of_all=of_all.setdefault(drafter.name, _first_acceptance(drafter.name)).begin()))
            for drafter in drafters
        ]
        self._max_draft_tokens = max_draft_tokens
        self._num_seen = self._num_judged = -1
        self._num_shown = self._num_unread = 0  # tokens that drafters have seen, and have not indexed
        self._is_late = False
        self._max_guesses = MAX_ROUNDS * (max_draft_tokens + 1)

    def judge(self, num_tokens: int, is_late: Callable[[], bool]) -> bool:
        """Return whether the sequence was late when it got its last token."""
        if num_tokens != self._num_judged:
            self._num_judged, self._is_late = num_tokens, is_late()
        return self._is_late

    def expect(self, num_known: int, forced: list[int]) -> None:
        """Note tokens that the grammar forces, see `GrammarDrafter`."""
        for drafter, _ in self._drafters:
            if isinstance(drafter, GrammarDrafter):
                drafter.expect(num_known, forced)

    def num_to_read(self, tokens: Items[int]) -> int:
        """Return how many tokens the drafters would take into their indexes if they were asked now, about."""
        return min(self._num_unread + len(tokens) - self._num_shown, MAX_TOKENS_PER_CALL)

    def draft(self, tokens: Items[int], max_tokens: int) -> Draft | None:
        """Guess the tokens after ``tokens``, the sequence's so far; None: no drafter has a guess."""
        best: Draft | None = None
        has_grown, self._num_seen = len(tokens) != self._num_seen, len(tokens)
        self._num_unread = max(self._num_unread + len(tokens) - self._num_shown - MAX_TOKENS_PER_CALL, 0)
        self._num_shown = len(tokens)
        for drafter, record in self._drafters:
            record.settle(tokens)
            if has_grown:  # between two tokens the choice of a step must not change, as nothing wakes the instance
                record.expected = record.of_all.value
            guess = drafter.draft(tokens, self._max_guesses)
            if drafter.name not in ModelDrafter.names:
                record.guess, record.num_known = guess[: self._max_draft_tokens], len(tokens)
            elif has_grown and not record.guess:  # what a draft model would guess is known only if it does
                record.of_all.forget(_FORGETTING_OF_MODEL)
            if guess and max_tokens > 0 and (best is None or record.acceptance > best.record.acceptance):
                best = Draft(guess, drafter.name, record).first(min(max_tokens, self._max_draft_tokens))
        return best


def _first_acceptance(drafter: str) -> Acceptance:
    if drafter in ModelDrafter.names:
        return Acceptance(_FIRST_ACCEPTANCE_OF_MODEL, _MEMORY_OF_MODEL, is_of_model=True)
    return Acceptance(_FIRST_ACCEPTANCE_OF_GRAMMAR) if drafter == GrammarDrafter.name else Acceptance()


class Speculation:
    """Makes the speculators of a scheduler's sequences, as configured, and keeps recent outputs for them."""

    def __init__(self, config: SpeculationConfig) -> None:
        self._config = config
        self._acceptances: dict[str, Acceptance] = {}
        self._outputs = OutputPools() if config.method in ("suffix", "auto") else None

    def begin(self, request: AddRequest, has_eagle_head: bool = False) -> Speculator | None:
        """Return the speculator of a request that has just come; None: nothing guesses its tokens.

        Args:
            has_eagle_head: what the workers have is an EAGLE-3 head.
        """
        drafters: list[Drafter] = []
        if request.sampling.grammar is not None:
            drafters.append(GrammarDrafter())
        if request.predicted_token_ids:
            drafters.append(PredictionDrafter(request.predicted_token_ids, len(request.prompt_token_ids)))
        if self._outputs is not None:
            drafters.append(SuffixDrafter(self._outputs.of(request.sampling.cache_salt)))
        if self._config.method in ("ngram", "auto"):
            drafters.append(NgramDrafter())
        if self._config.model is not None:
            drafters.append(ModelDrafter(EAGLE3 if has_eagle_head else DRAFT_MODEL))
        return Speculator(drafters, self._config.max_draft_tokens, self._acceptances) if drafters else None

    def on_ended(self, request: AddRequest, tokens: list[int]) -> None:
        """Remember the output of a request that has ended; ``tokens``: of prompt and output."""
        if self._outputs is not None:
            self._outputs.of(request.sampling.cache_salt).add(tokens, len(request.prompt_token_ids))
