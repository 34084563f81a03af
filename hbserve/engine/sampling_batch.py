"""The sampling of a step's rows: from the sequence table to a `SamplingBatch`, with one transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hbserve.engine.penalties import Penalties
from hbserve.engine.sampler import AllowedTokens, Biases, RandomRows, SamplingBatch
from hbserve.engine.sequence_table import UNKNOWN_POSITION, SequenceTable
from hbserve.messages.worker import PlanRow

Arrays = dict[str, npt.NDArray[np.generic]]


_NO_DRAFT = -1


class Samples(NamedTuple):
    """The N samples of a plan: one of each row that samples, and one more for each token of its draft.

    Attributes:
        rows: int64 ``[N]``, of the plan.
        before_end: int64 ``[N]``, how many tokens of its row come after the one whose logits are sampled.
        drafts: int64 ``[N]``, the draft token that the sample before led to if it is right; -1: the row's first sample.
        feeds_every_row: the last sample of each row is fed back, also that of a row with a draft.
    """

    rows: npt.NDArray[np.int64]
    before_end: npt.NDArray[np.int64]
    drafts: npt.NDArray[np.int64]
    feeds_every_row: bool = False

    def fed_slots(self, table: SequenceTable, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the slots ``[N]`` that get the sampled tokens: not those with a draft, but the padding slot."""
        if self.feeds_every_row:
            return np.where(self.before_end == 0, slots, table.padding_slot)
        drafting = slots[self.drafts != _NO_DRAFT]
        return np.where(np.isin(slots, drafting), table.padding_slot, slots) if drafting.size else slots

    def note_positions(self, table: SequenceTable, slots: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> None:
        """Note the positions ``ends [N]`` that the slots sample a token for; that of a slot with a draft is unknown."""
        if self.feeds_every_row:
            last = self.before_end == 0
            table.next_positions[slots[last]] = ends[last]
            return
        table.next_positions[slots] = ends
        table.next_positions[slots[self.drafts != _NO_DRAFT]] = UNKNOWN_POSITION


def samples_of(rows: list[PlanRow], feeds_every_row: bool = False) -> Samples:
    """Return the samples of a plan's rows, in their order."""
    if not any([row.num_drafts for row in rows]):
        indices = np.flatnonzero([row.sample for row in rows])
        return Samples(indices, np.zeros(len(indices), np.int64), np.full(len(indices), _NO_DRAFT), feeds_every_row)
    counts = np.array([row.num_samples for row in rows], np.int64)
    indices = np.repeat(np.arange(len(rows)), counts)
    ends = np.cumsum(counts)
    before_end = ends[indices] - 1 - np.arange(len(indices))
    drafts = np.full(len(indices), _NO_DRAFT, np.int64)
    for row, end in zip(rows, ends.tolist(), strict=True):
        if row.num_drafts:
            assert row.token_ids is not None, "a draft without tokens"
            assert row.num_drafts < row.num_tokens, "a row of nothing but guesses"
            drafts[end - row.num_drafts : end] = row.token_ids[-row.num_drafts :]
    return Samples(indices, before_end, drafts, feeds_every_row)


def sampling_arrays(
    table: SequenceTable,
    slots: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    drafts: npt.NDArray[np.int64],
) -> Arrays:
    """Return the arrays that the device needs to sample a token for these slots at these positions.

    Args:
        slots, positions: of the N rows that are sampled, in the order of their logits.
        drafts: see `Samples`.
    """
    arrays: Arrays = {}
    constrained = np.flatnonzero(table.grammars.has_grammar[slots])
    masks = table.grammars.masks(slots[constrained], constrained)
    random = np.flatnonzero(table.temperature[slots] > 0)
    if random.size:
        random_slots = slots[random]
        arrays.update(random_rows=random, seeds=table.seeds[random_slots], positions_sampled=positions[random])
        arrays.update(temperature=table.temperature[random_slots], min_p=table.min_p[random_slots])
        truncates = (table.top_k[random_slots] < table.vocab_size) | (table.top_p[random_slots] < 1)
        truncated = np.flatnonzero(truncates)
        if truncated.size:
            truncated_slots = random_slots[truncated]
            arrays.update(truncated=truncated, top_k=table.top_k[truncated_slots], top_p=table.top_p[truncated_slots])
    count_rows = table.token_counts.row_of_slot[slots]
    # The token of a row without its mask does not count.
    penalised = np.flatnonzero((count_rows >= 0) & ~table.grammars.missing(len(slots)))
    if penalised.size:
        penalised_slots = slots[penalised]
        arrays.update(penalised_rows=penalised, count_rows=count_rows[penalised])
        arrays.update(repetition=table.repetition[penalised_slots], presence=table.presence[penalised_slots])
        arrays.update(frequency=table.frequency[penalised_slots])
        guesses = drafts[penalised]
        if (guesses != _NO_DRAFT).any():
            arrays.update(guesses=guesses, **_guesses_before(guesses))
    too_early = np.flatnonzero(positions < table.min_end_positions[slots])
    suppressed = [(row, token) for row in too_early.tolist() for token in table.end_token_ids[slots[row]]]
    if suppressed:
        arrays["suppressed"] = np.array(suppressed, np.int64).T
    biases = [(row, *bias) for row, slot in enumerate(slots.tolist()) for bias in table.logit_bias[slot].items()]
    if biases:
        rows, token_ids, values = zip(*biases, strict=True)
        arrays["biased"] = np.array([rows, token_ids], np.int64)
        arrays["biases"] = np.array(values, np.float32)
    restricted = [row for row, slot in enumerate(slots.tolist()) if slot in table.allowed_words]
    if constrained.size or restricted:
        words = [table.allowed_words[slot][None] for slot in slots[restricted].tolist()]
        arrays.update(constrained_rows=np.array([*restricted, *constrained], np.int64))
        arrays.update(allowed_tokens=np.concatenate([*words, masks] if constrained.size else words))
    reported = np.flatnonzero(table.num_logprobs[slots] >= 0)
    if reported.size:
        arrays["logprob_rows"] = reported
    return arrays


def _guesses_before(guesses: npt.NDArray[np.int64]) -> Arrays:
    """Return for penalised samples each one's first sample of its row, and pairwise the guesses that precede it."""
    indices = np.arange(len(guesses))
    first = np.maximum.accumulate(np.where(guesses == _NO_DRAFT, indices, 0))
    counts = indices - first
    guessed_rows = np.repeat(indices, counts)
    steps = np.arange(len(guessed_rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return {
        "first_rows": first,
        "guessed_rows": guessed_rows,
        "guessed_ids": guesses[first[guessed_rows] + 1 + steps],
    }


def sampling_batch(
    table: SequenceTable, slots: npt.NDArray[np.int64], tensors: Mapping[str, torch.Tensor]
) -> SamplingBatch:
    """Build the batch from the arrays of `sampling_arrays` on the device."""
    random = penalties = suppressed = biases = allowed = None
    if "random_rows" in tensors:
        random = RandomRows(
            rows=tensors["random_rows"],
            seeds=tensors["seeds"],
            positions=tensors["positions_sampled"],
            temperature=tensors["temperature"],
            min_p=tensors["min_p"],
            truncated=tensors.get("truncated"),
            top_k=tensors.get("top_k"),
            top_p=tensors.get("top_p"),
        )
    if "penalised_rows" in tensors:
        penalties = Penalties(
            rows=tensors["penalised_rows"],
            count_rows=tensors["count_rows"],
            counts=table.token_counts.of(tensors["count_rows"]),
            repetition=tensors["repetition"],
            presence=tensors["presence"],
            frequency=tensors["frequency"],
            guesses=tensors.get("guesses"),
            first_rows=tensors.get("first_rows"),
        )
        if "guessed_rows" in tensors:
            penalties.count_guesses_(tensors["guessed_rows"], tensors["guessed_ids"])
    if "suppressed" in tensors:
        rows, token_ids = tensors["suppressed"]
        suppressed = rows, token_ids
    if "biased" in tensors:
        rows, token_ids = tensors["biased"]
        biases = Biases(rows, token_ids, tensors["biases"])
    if "constrained_rows" in tensors:
        allowed = AllowedTokens(tensors["constrained_rows"], tensors["allowed_tokens"])
    return SamplingBatch(
        random=random,
        penalties=penalties,
        suppressed=suppressed,
        biases=biases,
        allowed=allowed,
        logprob_rows=tensors.get("logprob_rows"),
        num_top_logprobs=max(0, int(table.num_logprobs[slots].max(initial=0))),
    )
