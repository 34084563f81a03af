"""The batch of a step: a plan as the tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from hbserve.attention.base import AttentionBatch
from hbserve.engine.prompt_scores import ScoredTokens
from hbserve.engine.sampler import SamplingBatch
from hbserve.engine.sampling_batch import samples_of, sampling_arrays, sampling_batch
from hbserve.engine.sequence_table import SequenceTable
from hbserve.engine.staging import to_device
from hbserve.messages.worker import PlanRow

_TO_BE_FED_BACK = (0,)
"""The place of a token that only the device knows yet."""


@dataclass(frozen=True)
class StepBatch:
    """The tensors of a step. Tokens are in an order that suits attention; sampled rows are in the plan's order.

    Attributes:
        token_ids, positions: int64 ``[tokens]``.
        sampled_tokens: int64 ``[N]``, the places in the flat batch whose logits are sampled: several of a row with a
            draft.
        sampled_slots: int64 ``[N]``, the slots that are fed the sampled tokens back; `SequenceTable.padding_slot` for
            rows with a draft, whose next tokens are in their next plan.
        num_logprobs: ``[N]``, on the host: as `SamplingParams.logprobs`, -1 for none.
        sampling: how to sample them; its row i belongs to ``sampled_tokens[i]``.
        scored: the places whose next tokens' log-probabilities are reported; None: there are none.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    attention: AttentionBatch
    sampled_tokens: torch.Tensor
    sampled_slots: torch.Tensor
    num_logprobs: list[int]
    sampling: SamplingBatch
    scored: ScoredTokens | None = None


def build_batch(rows: list[PlanRow], table: SequenceTable, block_size: int, device: torch.device) -> StepBatch:
    """Turn a plan's rows into tensors, with one transfer. There is at least one row, and its blocks are appended.

    Tokens to be fed back come from the table. The table also notes for which positions this step samples. A plan that
    contradicts the table is a bug of the scheduler and fails an assertion.
    """
    slots = np.array([row.slot for row in rows], np.int64)
    starts = np.array([row.start for row in rows], np.int64)
    counts = np.array([row.num_tokens for row in rows], np.int64)
    _check(slots, starts, counts, table, block_size)
    ends = starts + counts

    order = np.argsort(counts > 1, kind="stable")
    query_starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts[order], out=query_starts[1:])
    row_of_token = np.repeat(order, counts[order])
    positions = starts[row_of_token] + np.arange(query_starts[-1]) - np.repeat(query_starts[:-1], counts[order])
    blocks = table.block_tables[slots[row_of_token], positions // block_size].astype(np.int64)

    ordered_rows = [rows[i] for i in order.tolist()]
    fed_back = np.flatnonzero([row.token_ids is None for row in ordered_rows])
    _check_feedback(order[fed_back], slots, starts, counts, table)

    place = np.empty_like(order)
    place[order] = np.arange(len(rows))
    samples = samples_of(rows)
    sampled, before_end = samples.rows, samples.before_end
    sampled_slots, sampled_ends = slots[sampled], ends[sampled] - before_end
    samples.note_positions(table, sampled_slots, sampled_ends)

    arrays = {
        "token_ids": _token_ids(ordered_rows, int(query_starts[-1]), table.vocab_size),
        "positions": positions,
        "slot_mapping": blocks * block_size + positions % block_size,
        "fed_back": fed_back,  # rows of one token come first, so row and place in the flat batch are equal
        "fed_back_slots": slots[order[fed_back]],
        "sampled_tokens": query_starts[1:][place[sampled]].astype(np.int64) - 1 - before_end,
        "sampled_slots": samples.fed_slots(table, sampled_slots),
        **sampling_arrays(table, sampled_slots, sampled_ends, samples.drafts),
    }
    scoring = [row for row in rows if row.next_token_ids is not None]
    if scoring:
        arrays.update(_scored_arrays(rows, query_starts[place]))
    tensors = to_device(arrays, device)
    token_ids = tensors["token_ids"]
    if fed_back.size:
        # without a largest logit no token was sampled; the host finds that in the result of the step before
        last = table.last_token_ids[tensors["fed_back_slots"]].clamp_(0, table.vocab_size - 1)
        token_ids[tensors["fed_back"]] = last
    width = -(-int(ends.max()) // block_size)
    return StepBatch(
        token_ids=token_ids,
        positions=tensors["positions"],
        attention=AttentionBatch(
            num_decode_rows=int((counts == 1).sum()),
            query_starts=query_starts,
            context_lens=ends[order].astype(np.int32),
            block_tables=table.block_tables[slots[order], :width],
            slot_mapping=tensors["slot_mapping"],
        ),
        sampled_tokens=tensors["sampled_tokens"],
        sampled_slots=tensors["sampled_slots"],
        num_logprobs=table.num_logprobs[sampled_slots].tolist(),
        sampling=sampling_batch(table, sampled_slots, tensors),
        scored=ScoredTokens(
            tensors["scored_tokens"],
            tensors["next_token_ids"],
            [(len(row.next_token_ids or ()), int(table.num_prompt_logprobs[row.slot])) for row in scoring],
        )
        if scoring
        else None,
    )


def _scored_arrays(rows: list[PlanRow], begins: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.generic]]:
    """Return the places in the flat batch that are scored, and the tokens after them; ``begins``: of each row."""
    places, token_ids = [], []
    for row, begin in zip(rows, begins.tolist(), strict=True):
        if row.next_token_ids is not None:
            assert len(row.next_token_ids) <= row.num_tokens, "a row scores more tokens than it computes"
            places.append(np.arange(begin, begin + len(row.next_token_ids)))
            token_ids += row.next_token_ids
    return {"scored_tokens": np.concatenate(places), "next_token_ids": np.array(token_ids, np.int64)}


def _token_ids(rows: list[PlanRow], num_tokens: int, vocab_size: int) -> npt.NDArray[np.int64]:
    flat = chain.from_iterable(_TO_BE_FED_BACK if row.token_ids is None else row.token_ids for row in rows)
    token_ids = np.array(list(flat), np.int64)
    assert len(token_ids) == num_tokens, f"the rows announce {num_tokens} tokens and hold {len(token_ids)}"
    # on a GPU an index out of range would end every process on that GPU
    assert token_ids.min() >= 0, "a token id is negative"
    assert token_ids.max() < vocab_size, f"token id {token_ids.max()} is outside the vocabulary of {vocab_size}"
    return token_ids


def _check(
    slots: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    table: SequenceTable,
    block_size: int,
) -> None:
    assert ((slots >= 0) & (slots < table.max_num_seqs)).all(), (
        f"slots {slots.tolist()} are not all in 0..{table.max_num_seqs - 1}"
    )
    assert len(np.unique(slots)) == len(slots), f"slots {slots.tolist()} are not all different"
    unknown = slots[~table.installed[slots]]
    assert not unknown.size, f"slots {unknown.tolist()} have no sequence"
    assert (counts >= 1).all(), "a row has no tokens"
    assert (starts >= 0).all(), "a row starts before position 0"
    beyond = slots[starts + counts > table.num_table_blocks[slots] * block_size]
    assert not beyond.size, f"slots {beyond.tolist()} have positions beyond their block tables"


def _check_feedback(
    fed_back: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    table: SequenceTable,
) -> None:
    assert (counts[fed_back] == 1).all(), "only a row of one token can be fed back"
    wrong = slots[fed_back][table.next_positions[slots[fed_back]] != starts[fed_back]]
    assert not wrong.size, f"slots {wrong.tolist()} have sampled no token for the position they start at"
