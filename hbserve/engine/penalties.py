"""Penalties of a sequence, and the counts of its tokens that they are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

PROMPT_FLAG = 1 << 30
"""Set in a token's count where the token is in the prompt; the bits below count it in the output."""


class TokenCounts:
    """Token counts: one row on the device for each sequence that has penalties.

    The first such sequence takes the memory; more sequences double it.

    Args:
        max_num_seqs: slots are ``0 .. max_num_seqs - 1``.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.row_of_slot: npt.NDArray[np.int64] = np.full(max_num_seqs, -1, np.int64)
        self._table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free_rows: list[int] = []

    def install(self, slot: int, history: list[int], num_prompt_tokens: int) -> None:
        """Count a sequence's tokens so far, in place of the slot's counts before."""
        vocab_size = self._table.shape[1]
        tokens = np.asarray(history, np.int64)
        assert ((tokens >= 0) & (tokens < vocab_size)).all(), f"slot {slot}: history has a token outside the vocabulary"
        counts = np.bincount(tokens[num_prompt_tokens:], minlength=vocab_size).astype(np.int32)
        counts[tokens[:num_prompt_tokens]] |= PROMPT_FLAG
        if self.row_of_slot[slot] < 0:
            if not self._free_rows:
                self._grow()
            self.row_of_slot[slot] = self._free_rows.pop()
        self._table[int(self.row_of_slot[slot])].copy_(torch.from_numpy(counts))

    def forget(self, slot: int) -> None:
        """Free the slot's row, if it has one."""
        if self.row_of_slot[slot] >= 0:
            self._free_rows.append(int(self.row_of_slot[slot]))
            self.row_of_slot[slot] = -1

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a copy of the counts, int32 ``[len(rows), vocab]``, of rows as in ``row_of_slot``."""
        return self._table[rows]

    def add(self, rows: torch.Tensor, token_ids: torch.Tensor, times: torch.Tensor | None = None) -> None:
        """Count one more output token for each of these rows.

        Args:
            times: int32, 0 or 1, how often each counts; None: the rows are all different, and each counts.
        """
        if times is None:
            self._table[rows, token_ids] += 1
        else:
            self._table.index_put_((rows, token_ids), times, accumulate=True)

    def _grow(self) -> None:
        old = self._table.shape[0]
        grown = self._table.new_zeros(max(4, 2 * old), self._table.shape[1])
        grown[:old] = self._table
        self._table = grown
        self._free_rows.extend(reversed(range(old, grown.shape[0])))


@dataclass(frozen=True)
class Penalties:
    """Penalties of P rows; `hbserve.sampling_params.SamplingParams` says what they do.

    Attributes:
        rows: int64 ``[P]``, rows of the logits.
        count_rows: int64 ``[P]``, rows of `TokenCounts`.
        counts: int32 ``[P, vocab]``, from `TokenCounts.of`.
        repetition, presence, frequency: float32 ``[P]``.
        guesses: int64 ``[P]``, the draft token that row i has seen and row i - 1 should sample; -1: a sequence's first
            row. None: no sequence has a draft.
        first_rows: int64 ``[P]``, the first row of each row's sequence; None likewise.
    """

    rows: torch.Tensor
    count_rows: torch.Tensor
    counts: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    guesses: torch.Tensor | None = None
    first_rows: torch.Tensor | None = None

    def count_guesses_(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Count draft tokens as output, in place: pairs of a row, 0 to P - 1, and a guess before it."""
        ones = torch.ones_like(rows, dtype=self.counts.dtype)
        self.counts.index_put_((rows, token_ids), ones, accumulate=True)

    def times(self, token_ids: torch.Tensor) -> torch.Tensor | None:
        """Return how often each sampled token ``[P]`` counts, int32: 0 behind a wrong guess; None: all count once."""
        if self.guesses is None or self.first_rows is None:
            return None
        wrong = (self.guesses >= 0) & (token_ids.roll(1) != self.guesses)
        num_wrong = wrong.cumsum(0)
        return (num_wrong == num_wrong[self.first_rows]).to(self.counts.dtype)

    def apply_(self, scores: torch.Tensor) -> None:
        """Apply the penalties to their rows of the float32 scores ``[rows, vocab]``, in place."""
        penalised = scores[self.rows]
        repetition = self.repetition[:, None]
        repeated = torch.where(penalised > 0, penalised / repetition, penalised * repetition)
        penalised = torch.where(self.counts != 0, repeated, penalised)
        in_output = self.counts & (PROMPT_FLAG - 1)
        penalised -= self.frequency[:, None] * in_output
        penalised -= self.presence[:, None] * (in_output > 0)
        scores[self.rows] = penalised
