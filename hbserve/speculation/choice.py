"""The choice of a step's drafts: which sequences get how many rows more, by what these cost and may bring.

Drafts need the last token, so a sequence that drafts cannot be in a plan before its last result is known. The device
then idles for a *gap*, the travel of a result and a plan, unless it computes other sequences meanwhile. Three ways to
go on are compared by tokens per second, with N sequences that do not draft, S that do and would bring E tokens each,
and a step of T seconds (T' with drafts):

    plain   no drafts, the next plan is made ahead      (N + S) / T
    split   the others are planned ahead without them   (2 N + S E) / (T + T')
    whole   the step waits for every result             (N + S E) / (T' + gap)

A draft model guesses at the head of the step: one forward pass for each guess, of all sequences that it guesses for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from enum import Enum
from typing import NamedTuple

from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork, keys_of_guesses
from hbserve.speculation.rounds import MAX_ROUNDS
from hbserve.speculation.speculator import Draft, Record

_MIN_GAIN = 1.03
"""Drafts must promise so much more than their cost: predictions are off by a few percent."""
_MIN_GAIN_OF_STEP = 1.1
"""The same for all drafts of a step together: those that look best are tried, and are a little worse than they look."""
_MIN_GAIN_TO_GO_ON = 1.03
"""The same while there are drafts. The first step with drafts and the first one without them cost a gap each."""
_MORE_FOR_PASSES = 0.25
"""How much more that must be if a draft model's passes are all of the step's time, else their part of it: a draft model
also reads, and its rounds wait for the host."""
_MIN_PROBABILITY = 0.05
"""Guesses that are less probable are not tried, even where a row seems to cost nothing."""
_MIN_STEP_S = 1e-6
_FIRST_DRAFT_SHARE = 0.15
"""Time of a draft model's forward pass as a part of the step's, while it is not known."""
_ROUNDS = 2
_STEPS_PER_READ = 16
"""Steps over which a draft model's reading pays off: a sequence that has been read usually drafts again."""
_LATE_WORTH = 0.5
"""Part of the usual worth at which guesses of a late sequence are tried: it may cost the others that much."""


class Way(Enum):
    """How a step goes on; see the head of this file."""

    PLAIN = "plain"
    SPLIT = "split"
    WHOLE = "whole"


class Candidate(NamedTuple):
    """A sequence that has a draft.

    Attributes:
        position: of its last token; is_known: that token is known.
        is_late: it is behind its TPOT target, so its guesses are tried at a lower probability.
        must_read: the draft model reads what it has missed of the sequence before it guesses.
    """

    draft: Draft
    position: int
    is_known: bool
    is_late: bool = False
    must_read: bool = False


class Choice(NamedTuple):
    """The way to go on, and how many draft tokens each candidate gets, in their order.

    Attributes:
        gain: factor on tokens per second that the drafts promise, late sequences' like all others; 1: there are none.
    """

    way: Way
    lengths: list[int]
    gain: float = 1.0


def choose(
    candidates: Items[Candidate],
    work: StepWork,
    predictor: StepTimePredictor,
    gap_s: float,
    max_rows: int,
    draft_s: float = 0.0,
    read_s: float = 0.0,
    goes_on: bool = False,
) -> Choice:
    """Choose the drafts of a step.

    Args:
        candidates: at least one.
        work: of a step of all decoding sequences, candidates included, without drafts.
        gap_s: time that the device idles when a plan waits for a result.
        max_rows: rows that the drafts may add.
        draft_s: time of a forward pass of the draft model; 0: unknown.
        read_s: time in which the draft model reads what it has missed.
        goes_on: the step before had drafts.
    """
    num_rows = work.decode_rows
    step_s = max(predictor.seconds(work), _MIN_STEP_S)
    keys = keys_of_guesses(1, sum([candidate.position for candidate in candidates]) / len(candidates))
    more = work._replace(decode_rows=num_rows + 1, decode_keys=work.decode_keys + keys)
    row_s = max(predictor.seconds(more) - step_s, 0.0)
    num_of_model = sum(candidate.draft.num_to_draft > 0 for candidate in candidates)
    draft_s = draft_s or _FIRST_DRAFT_SHARE * step_s
    # the sequences share a pass of the draft model
    costs = [row_s + (draft_s / num_of_model if candidate.draft.num_to_draft else 0.0) for candidate in candidates]
    records = [candidate.draft.record for candidate in candidates]
    acceptances = _shrunk(records)
    lengths, num_whole, drafted_s = [0] * len(candidates), num_rows, step_s
    for _ in range(_ROUNDS):
        # a row must bring at least what the step brings in the same time; drafts make that more (Dinkelbach 1967)
        rate = _MIN_GAIN * max(num_rows / step_s, num_whole / (drafted_s + gap_s))
        worths = [rate * cost_s for cost_s in costs]
        lengths, num_expected, num_worth = _lengths(candidates, acceptances, worths, max_rows)
        num_drafting = sum(length > 0 for length in lengths)
        pairs = zip(candidates, lengths, strict=True)
        num_passes = max((length for candidate, length in pairs if candidate.draft.num_to_draft), default=0)
        drafted_s = step_s + row_s * sum(lengths) + draft_s * num_passes
        if any([length and candidate.must_read for candidate, length in zip(candidates, lengths, strict=True)]):
            drafted_s += read_s / _STEPS_PER_READ
        num_others = num_rows - num_drafting
        num_whole = num_others + num_expected
    if not num_drafting:
        return Choice(Way.PLAIN, lengths)
    min_gain = _MIN_GAIN_TO_GO_ON if goes_on else _MIN_GAIN_OF_STEP
    if not goes_on and not any([candidate.is_late for candidate in candidates]):
        min_gain += _doubt(records, acceptances)
    min_gain += _MORE_FOR_PASSES * draft_s * num_passes / drafted_s
    ways = {
        Way.PLAIN: num_rows / step_s,
        Way.SPLIT: (2 * num_others + num_worth / min_gain) / (step_s + drafted_s) if num_others else 0.0,
        Way.WHOLE: (num_others + num_worth) / min_gain / (drafted_s + gap_s),
    }
    way = max(ways, key=lambda way: ways[way])
    if way is Way.PLAIN:
        return Choice(way, [0] * len(candidates))
    num_tokens, seconds = num_others + num_expected, drafted_s + gap_s
    if way is Way.SPLIT:
        num_tokens, seconds = num_tokens + num_others, drafted_s + step_s
    return Choice(way, lengths, num_tokens / seconds / ways[Way.PLAIN])


def can_gain(
    candidates: Items[Candidate],
    num_asked: int,
    share: float,
    work: StepWork,
    predictor: StepTimePredictor,
    gap_s: float,
) -> bool:
    """Whether drafts may gain something in a batch of which some sequences have been asked.

    The answer is for the best of them: as if all that have a guess were right as often, and the step did many rounds.

    Args:
        candidates: those that have a guess.
        num_asked: sequences that were asked for one.
        share: of the batch's sequences, those that can be asked.
        work: of a step of all decoding sequences, without drafts.
    """
    if not candidates or any([candidate.is_late for candidate in candidates]):
        return bool(candidates)
    best = max([candidate.draft.record.acceptance for candidate in candidates])
    num_drafting = share * len(candidates) / num_asked * work.decode_rows
    step_s = max(predictor.seconds(work), _MIN_STEP_S)
    position = sum([candidate.position for candidate in candidates]) / len(candidates)
    rows, keys = work.decode_rows, work.decode_keys
    num_more, probability = 0.0, 1.0
    for length in range(1, max([len(candidate.draft.token_ids) for candidate in candidates]) + 1):
        probability *= best
        num_more += num_drafting * probability
        more = keys_of_guesses(num_drafting * length, position)
        seconds = predictor.seconds(work._replace(decode_rows=rows + num_drafting * length, decode_keys=keys + more))
        if (rows + num_more) * step_s > _MIN_GAIN * rows * (seconds + gap_s / MAX_ROUNDS):
            return True
    return False


def _shrunk(records: Items[Record]) -> list[float]:
    """Return the acceptances that records stand for, moved towards their mean as far as chance explains their spread.

    Of many sequences that are alike, those with most luck would be tried most (Stein; Efron and Morris 1975).
    """
    acceptances = [record.acceptance for record in records]
    num_free = len(records) - 3
    if num_free <= 0:
        return acceptances
    mean = sum(acceptances) / len(records)
    spread = sum([(acceptance - mean) ** 2 for acceptance in acceptances])
    by_chance = mean * (1 - mean) * len(records) / sum([record.weight for record in records])
    kept = max(0.0, 1 - num_free * by_chance / spread) if spread else 0.0
    return [mean + kept * (acceptance - mean) for acceptance in acceptances]


def _doubt(records: Items[Record], acceptances: Items[float]) -> float:
    """Return how much less the mean acceptance may be than it looks, by its standard error.

    A drafter of text is so watched first where a try costs much. A draft model shows nothing unless it is tried.
    """
    if all([record.must_be_tried for record in records]):
        return 0.0
    mean = sum(acceptances) / len(acceptances)
    return math.sqrt(mean * (1 - mean) / sum([record.weight for record in records]))


def _lengths(
    candidates: Items[Candidate], acceptances: Items[float], worths: Items[float], max_rows: int
) -> tuple[list[int], float, float]:
    """Return each candidate's number of draft tokens, the tokens that those with any are expected to bring, and the
    same as what they are worth, where each one after the first of a late sequence counts double.

    The i-th token of a draft gets a row if its first i
    tokens are all right with a higher probability than the candidate's worth. Where rows are short, late sequences
    get theirs first, then the most probable tokens.

    Args:
        worths: for each candidate, the probability at which a token is worth its cost.
    """
    offers: list[tuple[bool, float, int]] = []
    for index, (candidate, acceptance, worth) in enumerate(zip(candidates, acceptances, worths, strict=True)):
        probability = 1.0
        is_late = candidate.is_late
        limit = max(_LATE_WORTH * worth if is_late else worth, _MIN_PROBABILITY)
        for _ in candidate.draft.token_ids:
            probability *= acceptance
            if probability <= limit:
                break
            offers.append((is_late, probability, index))
    if len(offers) > max_rows:
        offers = sorted(offers, reverse=True)[: max(max_rows, 0)]
    lengths = [0] * len(candidates)
    num_expected = num_worth = 0.0
    for is_late, probability, index in offers:
        is_first = not lengths[index]
        num_expected += probability + is_first
        num_worth += (probability / _LATE_WORTH if is_late else probability) + is_first
        lengths[index] += 1
    return lengths, num_expected, num_worth
