"""Drafters: they guess the next tokens of a sequence from the tokens that are there. They run in the scheduler.

A guess can be anything. The worker samples every position itself, so a bad guess costs time and never a token.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from hbserve.messages.worker import TO_BE_DRAFTED

_ORDER = 3
"""Tokens that a place must share with the end of the sequence to be looked at."""
_SHIFT = 32
_MASK = (1 << _SHIFT * (_ORDER - 1)) - 1
_MAX_INDEXED = 16384
"""Tokens of a long prompt that are indexed, from its end. A token costs about 100 bytes."""
MAX_TOKENS_PER_CALL = 512
"""Tokens that a call indexes, in less than half a millisecond; `NgramDrafter` does four times as many in it."""


class Drafter(Protocol):
    """Something that guesses the next tokens of one sequence.

    Attributes:
        name: as in statistics.
    """

    name: str

    def draft(self, tokens: Items[int], max_tokens: int) -> list[int]:
        """Guess the tokens after ``tokens``, at most ``max_tokens``; empty: no guess.

        Between two calls ``tokens`` only grows. A drafter may take several calls to read a long prompt, because the
        scheduler must not wait for it.
        """
        ...


class NgramDrafter:
    """Lookup in the prompt and the output so far: what followed the last three tokens when they were there last.

    Saxena 2023, "Prompt lookup decoding".
    """

    name = "ngram"

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}  # from an n-gram, packed, to the place behind its last occurrence
        self._num_indexed: int | None = None  # n-grams that end before this place are in the index
        self._gram = 0  # the one that ends there

    def draft(self, tokens: Items[int], max_tokens: int) -> list[int]:
        """See `Drafter`; the n-gram at the very end has no continuation yet, and is not in the index."""
        if len(tokens) <= _ORDER:
            return []
        begin = self._num_indexed
        if begin is None:
            begin = max(0, len(tokens) - _MAX_INDEXED)
            for token in tokens[begin : begin + _ORDER]:
                self._gram = self._gram << _SHIFT | token
            begin += _ORDER
        gram, ends, end = self._gram, self._ends, min(len(tokens), begin + 4 * MAX_TOKENS_PER_CALL)
        for place in range(begin, end):
            ends[gram] = place
            gram = (gram & _MASK) << _SHIFT | tokens[place]
        self._gram, self._num_indexed = gram, end
        if end < len(tokens):
            return []
        place = ends.get(gram, end)
        return list(tokens[place : place + max_tokens])


DRAFT_MODEL, EAGLE3 = "draft_model", "eagle3"


class ModelDrafter:
    """The draft model or head in the workers: it always has a guess, which is known when the step's result is."""

    names = (DRAFT_MODEL, EAGLE3)

    def __init__(self, name: str = DRAFT_MODEL) -> None:
        self.name = name

    def draft(self, tokens: Items[int], max_tokens: int) -> list[int]:
        """See `Drafter`; the guesses are `TO_BE_DRAFTED`."""
        return [TO_BE_DRAFTED] * max_tokens


class GrammarDrafter:
    """Tokens that the request's grammar leaves no choice of; workers find them (`StepResult.forced`)."""

    name = "grammar"

    def __init__(self) -> None:
        self._num_known = 0
        self._forced: list[int] = []

    def expect(self, num_known: int, forced: list[int]) -> None:
        """Note the only tokens that may follow the first ``num_known`` of the sequence."""
        self._num_known, self._forced = num_known, forced

    def draft(self, tokens: Items[int], max_tokens: int) -> list[int]:
        """See `Drafter`."""
        done = len(tokens) - self._num_known
        return self._forced[done : done + max_tokens] if done >= 0 else []


class PredictionDrafter:
    """The output that the client expects: it goes along the prediction, and finds its place again where they differ.

    Args:
        predicted: tokens of the whole output.
        num_before: tokens of the prompt.
    """

    name = "prediction"

    def __init__(self, predicted: Items[int], num_before: int) -> None:
        self._predicted = predicted
        self._num_seen = num_before
        self._num_before = num_before
        self._at = 0  # the place of the next output token in the prediction
        self._num_wrong = 0  # output tokens in a row that were not predicted
        self._ends: dict[tuple[int, ...], int] | None = None  # from an n-gram to the place behind it

    def draft(self, tokens: Items[int], max_tokens: int) -> list[int]:
        """See `Drafter`. A wrong token is taken for another one in its place. After three of them there is no guess
        until the output's last n-gram is found in the prediction.
        """
        predicted = self._predicted
        for place in range(self._num_seen, len(tokens)):
            is_right = self._at < len(predicted) and predicted[self._at] == tokens[place]
            self._num_wrong = 0 if is_right else self._num_wrong + 1
            self._at += 1
            begin = place + 1 - _ORDER
            if not is_right and begin >= self._num_before:
                found = self._find(tuple(tokens[begin : place + 1]))
                if found is not None:
                    self._at, self._num_wrong = found, 0
        self._num_seen = len(tokens)
        if self._num_wrong >= _ORDER:
            return []
        return list(predicted[self._at : self._at + max_tokens])

    def _find(self, gram: tuple[int, ...]) -> int | None:
        if self._ends is None:
            grams = zip(*(self._predicted[i:] for i in range(_ORDER)), strict=False)
            self._ends = {found: end for end, found in enumerate(grams, _ORDER)}
        return self._ends.get(gram)
