"""Rounds: a step that goes on by itself, without a result to the scheduler and a plan back in between.

Each round verifies a draft of each row and begins behind the tokens that the round before has brought. Its guesses come
from the draft model, or go on in a longer guess that came with the plan. Scheduler and worker both compute the next
round from the tokens, so it need not be sent. A row whose output has ended stays where it is, with its guesses, until
the step ends. What it samples does not count::

    plan      the │ cat sat on a mat and ...        the first guesses, and those that are ahead
    round 1   the │ cat sat on        ─► cat sat in            result: 3 tokens, and more follows
    round 2   in  │ a   mat and       ─► a   mat and the       the guesses at these places, whatever was right before
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import msgspec

from hbserve.messages.worker import NO_TOKEN, TO_BE_DRAFTED, PlanRow, StepPlan, StepResult

MAX_ROUNDS = 8
_FILLER = 0
"""Guess of a row that has none left: rows keep their length from round to round."""


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


def next_guesses(draft: list[int], ahead: list[int], num_tokens: int) -> tuple[list[int], list[int]]:
    """Return a row's guesses in the next round, as many as before, and those ahead of them.

    Args:
        draft: its guesses in this round; ahead: of the tokens after these.
        num_tokens: that the row has brought.
    """
    length = len(draft)
    left = [*draft, *ahead][num_tokens:]
    return [*left[:length], *[_FILLER] * (length - len(left))], left[length:]


def next_round(plan: StepPlan, result: StepResult, end_tokens_of: Callable[[int], Items[int]]) -> StepPlan | None:
    """Return the plan of the next round; None: the step ends here, because all outputs have ended or a mask is late.

    Args:
        result: of this round.
        end_tokens_of: the tokens that end the output of a slot's sequence.
    """
    if plan.rounds <= 1:
        return None
    rows: list[PlanRow] = []
    num_going_on, index, made = 0, 0, iter(result.draft_ids)
    for row in plan.rows:
        assert row.token_ids is not None, "a row of a step with rounds knows its tokens"
        sampled = result.token_ids[index : index + row.num_samples]
        index += row.num_samples
        num_to_draft = row.num_to_draft
        draft = [next(made) for _ in range(num_to_draft)] or row.token_ids[1:]
        if row.stop <= row.start:  # it has ended in an earlier round
            rows.append(row)
            continue
        tokens = accepted_tokens(draft, sampled)
        if NO_TOKEN in tokens:
            return None
        start, unread, ahead = row.start + len(tokens), None, row.ahead
        if start >= row.stop or not {*end_tokens_of(row.slot)}.isdisjoint(tokens):
            kept = draft if num_to_draft else row.ahead
            rows.append(msgspec.structs.replace(row, new_block_ids=[], stop=row.start, ahead=kept))
            continue
        num_going_on += 1
        unread_start = start - 1
        if num_to_draft:
            guesses = [TO_BE_DRAFTED] * num_to_draft
            if plan.rereads:
                unread, unread_start = tokens[:-1] or None, row.start + 1
            else:
                unread = [draft[-1]] if len(tokens) > num_to_draft else None  # it has gone through no pass
        else:
            guesses, ahead = next_guesses(draft, ahead, len(tokens))
        changes = {"new_block_ids": [], "unread": unread, "unread_start": unread_start, "ahead": ahead}
        rows.append(msgspec.structs.replace(row, start=start, token_ids=[tokens[-1], *guesses], **changes))
    if not num_going_on:
        return None
    return msgspec.structs.replace(plan, rows=rows, new_sequences=[], role=None, rounds=plan.rounds - 1)
