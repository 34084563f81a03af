"""What drafters guess, how their records steer them, and which way a step goes on."""

from __future__ import annotations

import random

import pytest

from hbserve import SamplingParams
from hbserve.messages.client import AddRequest
from hbserve.messages.worker import TO_BE_DRAFTED, StepResult
from hbserve.policy.step_time_predictor import StepTimePredictor, StepWork
from hbserve.speculation import Draft, GrammarDrafter, NgramDrafter, PredictionDrafter, Speculator, SuffixDrafter
from hbserve.speculation.choice import Candidate, Way, choose
from hbserve.speculation.rounds import accepted_tokens
from hbserve.speculation.speculator import Record
from hbserve.speculation.suffixes import OutputPools
from tests.support.eager_drafts import Permissive
from tests.support.scheduler_parts import SchedulerParts

END = 9


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
        for _ in range(10):  # a long prompt is read in several calls
            drafter.draft(tokens, 5)
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


class Guesser:
    """Guesses one and the same token, as often as it may."""

    name = "guesser"

    def __init__(self, token: int) -> None:
        self.token = token

    def draft(self, tokens: object, max_tokens: int) -> list[int]:
        return [self.token] * max_tokens


def test_a_liar_costs_a_few_rows_and_is_believed_again_when_it_is_right() -> None:
    speculator = Speculator([Guesser(0)], 7)
    tokens = [1]
    model, rows = predictor(4.0, 0.02), []
    for right in (False, True):
        for _ in range(200):
            draft = speculator.draft(tokens, 100)
            assert draft is not None
            _, [length], _ = choose([Candidate(draft, 100, True)], StepWork(1, 100), model, 0.001, 100)
            rows.append(length)
            tokens.append(0 if right else 1)
    assert sum(rows[:200]) < 40
    assert not any(rows[30:200])
    assert rows[-1] == 7


def test_the_drafter_that_was_right_more_often_is_used() -> None:
    speculator = Speculator([Guesser(0), Guesser(1)], 3)
    tokens = [5]
    for _ in range(10):
        speculator.draft(tokens, 3)
        tokens.append(1)
    draft = speculator.draft(tokens, 2)
    assert draft is not None
    assert draft.token_ids == [1, 1]
    assert speculator.draft(tokens, 0) is None


def test_a_record_counts_guesses_up_to_the_first_wrong_one() -> None:
    record = Record(credit=0.0)
    record.guess, record.num_known = [1, 2, 3, 4], 1
    record.settle([9])
    assert record.tried == 0
    record.settle([9, 1, 2, 7, 4])
    assert record.tried == pytest.approx(1 + 0.97 + 0.97**2)
    assert record.right == pytest.approx(0.97 + 0.97**2)
    record.settle([9, 1, 2, 7, 4, 5])
    assert record.tried == pytest.approx(1 + 0.97 + 0.97**2)


def test_suffix_takes_the_longest_match_of_its_own_tokens_and_of_recent_outputs() -> None:
    pools = OutputPools()
    pools.of(None).add([50, 51, 1, 2, 3, 4, 5, 60, 61, 62, 63], 2)
    drafter = SuffixDrafter(pools.of(None))
    own = [7, 3, 4, 5, 70, 71, 72, 73, 8]
    assert drafter.draft([*own, 3, 4, 5], 6) == [70, 71, 72]  # three tokens match, in both
    assert SuffixDrafter(pools.of(None)).draft([*own, 2, 3, 4, 5], 6) == [60, 61, 62, 63]
    assert SuffixDrafter(pools.of("other tenant")).draft([*own, 2, 3, 4, 5], 6) == [70, 71, 72]


@pytest.mark.parametrize(
    ("output", "guess"),
    [
        ([99], [70, 71, 72]),  # an inserted token
        ([99, 98], [70, 71, 72]),
        ([99, 71], [72, 73, 8]),  # one in the place of another
        ([71], [72, 73, 8]),  # one is left out
        ([99, 98, 97], []),
        ([99, 98, 97, 70], []),  # until three tokens are found again
        ([99, 98, 97, 70, 71, 72], [73, 8, 3]),
    ],
)
def test_suffix_keeps_its_place_across_differences(output: list[int], guess: list[int]) -> None:
    drafter, tokens = SuffixDrafter(OutputPools().of(None)), [7, 3, 4, 5, 70, 71, 72, 73, 8, 3, 4, 5]
    found = drafter.draft(tokens, 6)
    for token in output:
        tokens.append(token)
        found = drafter.draft(tokens, 6)
    assert found == guess


def test_pools_forget_old_outputs_and_old_salts() -> None:
    pools = OutputPools()
    first = pools.of("0")
    first.add([1, 2, 3, 4], 1)
    assert SuffixDrafter(pools.of("0")).draft([1, 2, 3], 5) == [4]
    for _ in range(2):
        first.add([9] * 32_768, 0)
        for _ in range(512):  # a call reads some of what waits
            SuffixDrafter(first).draft([1, 2, 3], 5)
    first.add([5, 6, 7, 8], 0)
    assert SuffixDrafter(pools.of("0")).draft([1, 2, 3], 5) == []
    assert SuffixDrafter(pools.of("0")).draft([5, 6, 7], 5) == [8]
    for salt in range(1, 20):
        pools.of(str(salt))
    assert SuffixDrafter(pools.of("0")).draft([5, 6, 7], 5) == []


def length_of_match(tokens: list[int], place: int) -> int:
    length = 3
    while length < min(16, place) and tokens[place - length - 1] == tokens[-length - 1]:
        length += 1
    return length


def test_suffix_equals_a_search_for_the_longest_match() -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(3) for _ in range(40)]
    drafter = SuffixDrafter(OutputPools().of(None))
    for _ in range(100):
        guess = drafter.draft(tokens, 16)
        places = [place for place in range(3, len(tokens)) if tokens[place - 3 : place] == tokens[-3:]][-4:]

        matches = [(length_of_match(tokens, place), place) for place in reversed(places)]
        if places:
            length, best = max(matches, key=lambda found: found[0])
            assert guess == tokens[best : best + length]
        tokens += [rng.randrange(3) for _ in range(rng.randint(1, 3))]


def predictor(fixed_ms: float, row_ms: float) -> StepTimePredictor:
    """One that has seen steps of that form."""
    learnt = StepTimePredictor()
    rng = random.Random(2)
    for _ in range(60):
        rows = rng.randint(1, 300)
        learnt.observe(StepWork(rows, 100 * rows), (fixed_ms + row_ms * rows) / 1000)
    return learnt


def candidate(num_drafts: int = 7, acceptance: float = 0.7, is_known: bool = True) -> Candidate:
    return Candidate(Draft([1] * num_drafts, "ngram", Record(acceptance, 1.0, credit=0.0)), 100, is_known)


def test_a_lone_stream_drafts_long_and_a_batch_that_computes_does_not() -> None:
    cheap, dear = predictor(4.0, 0.02), predictor(1.0, 1.0)
    way, lengths, _ = choose([candidate()], StepWork(1, 100), cheap, gap_s=0.001, max_rows=100)
    assert (way, lengths) == (Way.WHOLE, [7])
    way, lengths, _ = choose([candidate()] * 64, StepWork(64, 6400), dear, gap_s=0.001, max_rows=1000)
    assert (way, lengths) == (Way.PLAIN, [0] * 64)
    way, lengths, _ = choose([candidate(acceptance=0.3)] * 256, StepWork(256, 25600), predictor(4.0, 0.02), 0.001, 1000)
    assert way is Way.PLAIN


def test_drafts_stay_within_the_rows_that_are_left_and_the_best_come_first() -> None:
    candidates = [candidate(acceptance=0.5), candidate(acceptance=0.9)]
    _, lengths, _ = choose(candidates, StepWork(2, 200), predictor(4.0, 0.0), gap_s=0.0, max_rows=5)
    assert lengths == [0, 5]
    way, lengths, _ = choose(candidates, StepWork(2, 200), predictor(4.0, 0.0), gap_s=0.0, max_rows=-3)
    assert (way, lengths) == (Way.PLAIN, [0, 0])


def test_a_step_waits_for_drafts_only_where_that_pays() -> None:
    """One sequence that drafts among others: they go on without it if a gap would cost them more than it brings."""
    model = predictor(4.0, 0.001)
    few, many = StepWork(2, 200), StepWork(60, 6000)
    assert choose([candidate(acceptance=0.95, is_known=False)], few, model, 0.0005, 100).way is Way.WHOLE
    assert choose([candidate(acceptance=0.95, is_known=False)], many, model, 0.004, 100).way is Way.SPLIT
    assert choose([candidate(1, 0.5, is_known=False)], many, model, 0.004, 100).way is Way.PLAIN


def test_a_late_sequence_tries_more() -> None:
    late = candidate(acceptance=0.7)._replace(is_late=True)
    pair, dear = StepWork(2, 200), predictor(1.0, 1.5)
    _, lengths, _ = choose([candidate(acceptance=0.7), late], pair, dear, gap_s=0.0, max_rows=100)
    assert lengths[1] > lengths[0]


def test_what_drafts_promise_counts_tokens_of_late_sequences_once() -> None:
    """The promise is compared with the time that passes (`measured_gain`), which knows of no targets."""
    alone, cheap = StepWork(1, 100), predictor(4.0, 0.02)
    late = candidate()._replace(is_late=True)
    choices = [choose([item], alone, cheap, gap_s=0.001, max_rows=100) for item in (candidate(), late)]
    assert choices[0] == choices[1]


def test_a_draft_model_is_used_where_its_passes_pay() -> None:
    cheap = predictor(4.0, 0.02)
    of_model = candidate(acceptance=0.9)
    of_model = of_model._replace(draft=Draft([TO_BE_DRAFTED] * 7, "draft_model", of_model.draft.record))
    lengths = [
        choose([of_model], StepWork(1, 100), cheap, 0.001, 100, draft_s=s).lengths[0] for s in (1e-5, 1.2e-3, 5e-3)
    ]
    assert lengths[0] == 7 > lengths[1] > lengths[2] == 0
    shared = choose([of_model] * 8, StepWork(8, 800), cheap, 0.001, 100, draft_s=1.2e-3).lengths
    assert 0 < min(shared) == max(shared) < 7


def test_what_a_grammar_forces_is_guessed_as_far_as_it_is_known() -> None:
    speculator = Speculator([GrammarDrafter()], 7)
    assert speculator.draft([1, 2], 9) is None
    speculator.expect(2, [3, 4, 5])
    for tokens, guess in (([1, 2], [3, 4, 5]), ([1, 2, 3], [4, 5])):
        draft = speculator.draft(tokens, 9)
        assert draft is not None
        assert draft.token_ids == guess
        assert draft.record.acceptance > 0.95
    assert speculator.draft([1, 2, 3, 4, 5], 9) is None


def test_a_prediction_counts_what_the_output_has_of_it() -> None:
    """Behind an end token the worker finds more right guesses; the client gets none of them, and counts none."""
    parts = SchedulerParts()
    parts.worker.gain = Permissive()
    parts.worker.timing.gap_s = 0.0
    predicted = [*[7] * 30, END, *[7] * 30]
    request = AddRequest("a", [1] * 20, [END], SamplingParams(max_tokens=100), predicted_token_ids=predicted)
    assert parts.requests.admit(parts.add_request(request))
    num_drafted, end = 0, 0
    while parts.plan():
        step = parts.worker.inflight[-1]
        [row] = step.rows
        tokens = (predicted + [7] * 40)[end : end + row.num_samples]
        num_drafted += row.num_samples - 1
        result = StepResult(epoch=1, step_id=step.step_id, token_ids=tokens, logprobs=None, busy_s=0.004)
        parts.requests.on_step_done(parts.worker, result)
        end += len(tokens)
    tokens = [token for output in parts.outputs for token in output.token_ids]
    assert tokens == predicted[:31]
    num_accepted = sum(output.num_accepted for output in parts.outputs)
    assert 0 < num_accepted < num_drafted
    assert num_accepted < len(tokens)
