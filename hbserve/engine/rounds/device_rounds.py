"""Rounds of a step on the device: a kernel between two replays of a graph does what `next_round` does on the host.

It runs in the thread that launches steps. A step's host arrays are for the longest outcome: the pages and the pieces of
attention reach as far as the rows can get in all rounds. Where they really are, only the device knows::

    inputs, from the host    token_ids  the cat sat on     positions  7 8 9 10      guesses  cat sat on a mat and the
    replay                   sampled    cat sat in ...
    advance                  token_ids  in  a  mat and     positions  10 11 12 13            three tokens further
    replay ...

A sequence that would start at its plan's ``stop`` stays where it is, and computes the same again. One that an end token
has ended goes on up to there, in blocks of its own, because only the host looks for end tokens. The host reads each
round's tokens as they come, and computes the same by `hbserve.speculation.rounds.next_round`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from hbserve.config import MAX_DRAFT_TOKENS
from hbserve.engine.staging import to_device
from hbserve.messages.worker import PlanRow

_LANES = MAX_DRAFT_TOKENS + 1


@triton.jit(do_not_specialize=["vocab_size"])
def _advance_kernel(  # type: ignore[no-untyped-def]
    token_ids, positions, num_stored, slot_mapping,  # changed
    sampled, indices, first_rows, lengths, first_pages, guesses, ends,
    stops, places,  # changed
    vocab_size, page: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    length = tl.load(lengths + sequence)
    lane = tl.arange(0, lanes)
    first = tl.load(first_rows + sequence)
    row = first + lane
    in_row = lane < length
    has_guess = lane + 1 < length
    token = tl.load(sampled + row, mask=in_row, other=0)
    guess = tl.load(token_ids + row + 1, mask=has_guess, other=0)
    is_right = has_guess & (token == guess)
    last = tl.min(tl.where(is_right, lanes, lane), axis=0)  # place of the first sample that was not guessed
    new = tl.sum(tl.where(lane == last, token, 0), axis=0)
    new = tl.where((new >= 0) & (new < vocab_size), new, 0)  # without a largest logit; the host finds it in the result
    stored = tl.load(num_stored + first) + last + 1
    stop = tl.load(stops + sequence)
    goes_on = lane < tl.where(stored < stop, length, 0)
    place = tl.load(places + sequence) + last + 1
    at = place + lane - 1
    is_known = in_row & (lane > 0) & (at < tl.load(ends + sequence))
    following = tl.load(guesses + at, mask=is_known, other=0)
    position = tl.load(positions + row, mask=in_row, other=0) + last + 1
    first_page = tl.load(first_pages + sequence)
    page_id = tl.load(indices + first_page + position // page, mask=goes_on, other=0)
    tl.debug_barrier()  # everything has been read
    tl.store(token_ids + row, tl.where(lane == 0, new, following), mask=goes_on)
    tl.store(positions + row, position, mask=goes_on)
    tl.store(num_stored + row, stored, mask=goes_on)
    tl.store(slot_mapping + row, page_id.to(tl.int64) * page + position % page, mask=goes_on)
    tl.store(places + sequence, place)
    # A sequence that has stopped does not go on, whatever is sampled from now on.
    tl.store(stops + sequence, tl.where(stored < stop, stop, 0))


@dataclass(frozen=True)
class RoundInputs:
    """What the kernel changes and reads of a graph's inputs, on the device; see `hbserve.engine.decode_graphs`.

    Attributes:
        token_ids, positions, num_stored, slot_mapping: int64 ``[rows]``, changed.
        indices: int32, pages of rows; as many as they may need in all rounds.
        block_size: tokens of a page.
    """

    token_ids: Tensor
    positions: Tensor
    num_stored: Tensor
    slot_mapping: Tensor
    indices: Tensor
    block_size: int


class DeviceRounds:
    """The rows of a plan with rounds, whose inputs `advance` moves behind the tokens that a round has sampled.

    Args:
        rows: of the plan; all have their tokens, and none of them is `TO_BE_DRAFTED`.
        first_pages: ``[sequences]``, where in ``inputs.indices`` the pages of a sequence's last token begin.
        vocab_size: sampled tokens are below it, unless the logits are no numbers.
    """

    def __init__(
        self, rows: list[PlanRow], inputs: RoundInputs, first_pages: npt.NDArray[np.int32], vocab_size: int
    ) -> None:
        self._inputs, self._vocab_size, self._num_sequences = inputs, vocab_size, len(rows)
        lengths = np.array([row.num_samples for row in rows], np.int64)
        guesses = [[*(row.token_ids or ())[1:], *row.ahead] for row in rows]
        ends = np.cumsum([len(tokens) for tokens in guesses])
        flat: npt.NDArray[np.int64] = np.array([token for tokens in guesses for token in tokens] or [0], np.int64)
        self._tensors = to_device(
            {
                "first_rows": np.cumsum(lengths) - lengths,
                "lengths": lengths,
                "first_pages": first_pages,
                "stops": np.array([row.stop for row in rows], np.int64),
                "guesses": flat,
                "places": ends - [len(tokens) for tokens in guesses],
                "ends": ends,
            },
            inputs.token_ids.device,
        )

    def advance(self, sampled: torch.Tensor) -> None:
        """Queue the change of the inputs; ``sampled``: int64 ``[rows]``, of the round before."""
        inputs, tensors = self._inputs, self._tensors
        _advance_kernel[(self._num_sequences,)](
            inputs.token_ids, inputs.positions, inputs.num_stored, inputs.slot_mapping,
            sampled, inputs.indices,
            tensors["first_rows"], tensors["lengths"], tensors["first_pages"], tensors["guesses"], tensors["ends"],
            tensors["stops"], tensors["places"],
            self._vocab_size, inputs.block_size, _LANES, num_warps=1,
        )  # fmt: skip
