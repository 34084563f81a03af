"""What drafters guess, how their records steer them, and which way a step goes on."""

from __future__ import annotations

import random

import pytest

from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork
from hbserve.speculation import Draft, Drafter, NgramDrafter, PredictionDrafter, Speculator
from hbserve.speculation.choice import Candidate, Way, choose
from hbserve.speculation.speculator import Record, accepted_tokens


def test_accepted_tokens_are_the_right_guesses_and_the_token_after_them() -> None:
    assert accepted_tokens([1, 2, 3], [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert accepted_tokens([1, 2, 3], [1, 9, 3, 4]) == [1, 9]
    assert accepted_tokens([1, 2, 3], [9, 2, 3, 4]) == [9]
    assert accepted_tokens([], [5]) == [5]


def test_ngram_guesses_what_followed_the_last_time() -> None:
    drafter = NgramDrafter()
    tokens = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    assert drafter.draft(tokens, 4) == [4, 5, 6, 1]
    assert drafter.draft(tokens, 2) == [4, 5]
    tokens += [7, 8, 1, 2, 3]
    assert drafter.draft(tokens, 2) == [7, 8]
    assert drafter.draft([*tokens, 9], 2) == []
    assert NgramDrafter().draft([1, 1], 4) == []
    assert NgramDrafter().draft([5, 5, 5, 5], 4) == [5]


def test_ngram_equals_a_search_backwards() -> None:
    rng = random.Random(1)
    for max_indexed_start in (0, 20_000):  # a prompt longer than what is indexed finds what lies at its end
        tokens = [rng.randrange(4) for _ in range(60 + max_indexed_start)]
        drafter = NgramDrafter()
        for _ in range(200):
            gram = tokens[-3:]
            places = (p for p in range(len(tokens) - 1, 2, -1) if tokens[p - 3 : p] == gram)
            place = next(places, len(tokens))
            assert drafter.draft(tokens, 5) == tokens[place : place + 5]
            tokens += [rng.randrange(4) for _ in range(rng.randint(1, 3))]


@pytest.mark.parametrize(
    ("output", "guess"),
    [
        ([], [10, 11, 12]),
        ([10, 11], [12, 13, 14]),
        ([10, 99], [12, 13, 14]),  # another token in its place
        ([10, 99, 98, 11, 12, 13], [14, 15, 16]),  # two tokens more
        ([10, 14, 15, 16], [17, 18, 19]),  # three tokens fewer
        ([*range(10, 20)], []),
        ([1, 2, 3, 4], []),  # something else altogether
        ([1, 2, 3, 4, 10, 11, 12], [13, 14, 15]),
    ],
)
def test_a_prediction_is_followed_across_differences(output: list[int], guess: list[int]) -> None:
    predicted = [*range(10, 20)]
    whole = PredictionDrafter(predicted, 2)
    steps = PredictionDrafter(predicted, 2)
    for number in range(len(output)):
        steps.draft([1, 2, *output[:number]], 3)
    assert whole.draft([1, 2, *output], 3) == steps.draft([1, 2, *output], 3) == guess


class Liar:
    """Never right."""

    name = "liar"

    def draft(self, tokens: object, max_tokens: int) -> list[int]:
        return [0] * max_tokens


def test_a_liar_costs_a_row_now_and_then() -> None:
    liar: Drafter = Liar()
    speculator = Speculator([liar], 7)
    tokens = [1]
    rows = []
    while len(tokens) < 4000:
        draft = speculator.draft(tokens, 100)
        if draft is not None:
            rows.append((len(tokens), len(draft.token_ids)))
            draft.record.add(len(draft.token_ids), 0, len(tokens) + 1)
        tokens.append(1)
    assert [number for at, number in rows if at > 40] == [1] * sum(at > 40 for at, _ in rows)
    assert len(rows) < 20
    assert len([at for at, _ in rows if at > 2000]) <= 3


def test_a_drafter_that_becomes_right_is_believed_again() -> None:
    record = Record()
    for _ in range(20):
        record.add(1, 0, 0)
    assert record.is_hopeless
    for _ in range(6):
        record.add(1, 1, 0)
    assert record.acceptance > 0.4


def predictor(fixed_ms: float, row_ms: float) -> StepTimePredictor:
    """One that has seen steps of that form."""
    learnt = StepTimePredictor()
    rng = random.Random(2)
    for _ in range(60):
        rows = rng.randint(1, 300)
        learnt.observe(StepWork(rows, 100 * rows), (fixed_ms + row_ms * rows) / 1000)
    return learnt


def candidate(num_drafts: int = 7, acceptance: float = 0.7, is_known: bool = True) -> Candidate:
    return Candidate(Draft([1] * num_drafts, "ngram", Record(acceptance, 1.0)), 100, is_known)


def test_a_lone_stream_drafts_long_and_a_batch_that_computes_does_not() -> None:
    cheap, dear = predictor(4.0, 0.02), predictor(1.0, 1.0)
    way, lengths = choose([candidate()], StepWork(1, 100), cheap, gap_s=0.001, max_rows=100)
    assert (way, lengths) == (Way.WHOLE, [7])
    way, lengths = choose([candidate()] * 64, StepWork(64, 6400), dear, gap_s=0.001, max_rows=1000)
    assert (way, lengths) == (Way.PLAIN, [0] * 64)
    way, lengths = choose([candidate(acceptance=0.3)] * 256, StepWork(256, 25600), predictor(4.0, 0.02), 0.001, 1000)
    assert way is Way.PLAIN


def test_drafts_stay_within_the_rows_that_are_left_and_the_best_come_first() -> None:
    candidates = [candidate(acceptance=0.5), candidate(acceptance=0.9)]
    _, lengths = choose(candidates, StepWork(2, 200), predictor(4.0, 0.0), gap_s=0.0, max_rows=5)
    assert lengths == [0, 5]
    way, lengths = choose(candidates, StepWork(2, 200), predictor(4.0, 0.0), gap_s=0.0, max_rows=-3)
    assert (way, lengths) == (Way.PLAIN, [0, 0])


def test_a_step_waits_for_drafts_only_where_that_pays() -> None:
    """One sequence that drafts among others: they go on without it if a gap would cost them more than it brings."""
    model = predictor(4.0, 0.001)
    few, many = StepWork(2, 200), StepWork(60, 6000)
    assert choose([candidate(acceptance=0.95, is_known=False)], few, model, 0.0005, 100).way is Way.WHOLE
    assert choose([candidate(acceptance=0.95, is_known=False)], many, model, 0.004, 100).way is Way.SPLIT
    assert choose([candidate(1, 0.5, is_known=False)], many, model, 0.004, 100).way is Way.PLAIN
