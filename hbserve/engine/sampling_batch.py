"""The sampling of a step's rows: from the sequence table to a `SamplingBatch`, with one transfer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from hbserve.engine.penalties import Penalties
from hbserve.engine.sampler import AllowedTokens, Biases, RandomRows, SamplingBatch
from hbserve.engine.sequence_table import SequenceTable

Arrays = dict[str, npt.NDArray[np.generic]]


def sampling_arrays(table: SequenceTable, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Arrays:
    """Return the arrays that the device needs to sample a token for these slots at these positions.

    Args:
        slots, positions: of the N rows that are sampled, in the order of their logits.
    """
    arrays: Arrays = {}
    constrained = np.flatnonzero(table.grammars.has_grammar[slots])
    masks = table.grammars.masks(slots[constrained])
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
    penalised = np.flatnonzero((count_rows >= 0) & ~table.grammars.missing(slots))
    if penalised.size:
        penalised_slots = slots[penalised]
        arrays.update(penalised_rows=penalised, count_rows=count_rows[penalised])
        arrays.update(repetition=table.repetition[penalised_slots], presence=table.presence[penalised_slots])
        arrays.update(frequency=table.frequency[penalised_slots])
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
        )
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
