"""Steps whose only purpose is their duration: `hbserve profile` repeats them, an idle scheduler sends single ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hbserve.messages.worker import PlanRow, SequenceState
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.sampling_params import SamplingParams

_GREEDY = SamplingParams(temperature=0, max_tokens=None)
_NUM_TOKEN_IDS = 200
"""Token ids of prompts are 1 to this: any vocabulary has them."""


class ProbeSize(NamedTuple):
    """What a step computes.

    Attributes:
        prompt_tokens: tokens of one prompt, after ``prompt_context`` others; 0: no prompt.
        decode_rows: sequences that get one token each, and then have ``decode_context`` tokens.
    """

    prompt_tokens: int = 0
    prompt_context: int = 0
    decode_rows: int = 0
    decode_context: int = 0

    @property
    def work(self) -> StepWork:
        """The same as predictions count it."""
        return StepWork(
            self.decode_rows,
            self.decode_rows * max(0, self.decode_context - 1),
            self.prompt_tokens,
            num_pairs(self.prompt_tokens, self.prompt_context),
        )

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """For each sequence the tokens before the step, and its tokens in the step."""
        sequences = [(self.decode_context - 1, 1)] * self.decode_rows
        return [*sequences, (self.prompt_context, self.prompt_tokens)] if self.prompt_tokens else sequences

    def num_blocks(self, block_size: int) -> int:
        """Compute the entries of all block tables together."""
        return sum(-(-(start + tokens) // block_size) for start, tokens in self.sequences)


def probe_rows(size: ProbeSize, blocks: Sequence[int], block_size: int) -> tuple[list[SequenceState], list[PlanRow]]:
    """Return the states that a plan must install, in slots from 0 on, and its rows.

    Args:
        blocks: the blocks of all tables, taken in turn and again from the first if they are too few. The step reads
            them and writes to them; their contents do not matter for the time.
    """
    states, rows = [], []
    next_block = 0
    for slot, (start, num_tokens) in enumerate(size.sequences):
        count = -(-(start + num_tokens) // block_size)
        table = [blocks[(next_block + index) % len(blocks)] for index in range(count)]
        next_block += count
        states.append(
            SequenceState(
                slot=slot,
                block_ids=table,
                sampling=_GREEDY,
                end_token_ids=[],
                min_end_position=0,
                num_prompt_tokens=start,
            )
        )
        tokens = [1 + index % _NUM_TOKEN_IDS for index in range(num_tokens)]
        rows.append(
            PlanRow(slot=slot, start=start, num_tokens=num_tokens, token_ids=tokens, new_block_ids=[], sample=True)
        )
    return states, rows
