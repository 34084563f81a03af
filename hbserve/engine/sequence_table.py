"""The sequence table: a worker's state of each sequence, by slot. A `SequenceState` rebuilds all of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from hbserve.engine.grammar_table import GrammarTable
from hbserve.engine.penalties import Penalties, TokenCounts
from hbserve.messages.worker import PlanRow, SequenceState

UNKNOWN_POSITION = -1
FED_BACK = -1
"""In place of a row's token: the one that its slot has sampled last."""
_NOT_SAMPLED = "a slot has sampled no token for the position it starts at"
_MIN_TOP_P = 1e-30  # less could be 0 in float32, which would drop even the most likely token


class SequenceTable:
    """Per-slot state; host arrays are indexed by slot.

    Args:
        max_num_seqs: slots are ``0 .. max_num_seqs - 1``.
        max_blocks_per_seq: width of the block tables.
        num_blocks: of the KV pool; block ids are ``0 .. num_blocks - 1``.

    Attributes:
        block_tables: int32 ``[slots, max_blocks_per_seq]``, valid up to ``num_table_blocks``.
        last_token_ids: int64 ``[slots + 1]``, on the device: the token sampled last. The last entry is for
            ``padding_slot``, the slot of padding rows.
        plain_sampling: whether there are no penalties, biases, masks, grammar, truncation or logprobs; only a
            temperature.
        next_positions: the position of that token, or `UNKNOWN_POSITION`.
        num_logprobs: as `SamplingParams.logprobs`, -1 for none; num_prompt_logprobs: likewise, 0 for none.
        end_token_ids: per slot; they are not sampled for positions before ``min_end_positions``.
        token_counts: of the slots that have penalties.
        logit_bias: per slot, by token id.
        allowed_words: bit masks by slot, of slots that may sample only some tokens: bit i of word w is token
            ``32 * w + i``.
        grammars: of the slots that have one.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        num_blocks: int,
        vocab_size: int,
        device: torch.device,
        tokenizer_folder: str = "",
    ) -> None:
        self.max_num_seqs, self.num_blocks, self.vocab_size = max_num_seqs, num_blocks, vocab_size
        self.block_tables = np.zeros((max_num_seqs, max_blocks_per_seq), np.int32)
        self.num_table_blocks = np.zeros(max_num_seqs, np.int64)
        self.installed = np.zeros(max_num_seqs, np.bool_)
        self.padding_slot = max_num_seqs
        self.last_token_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.next_positions = np.full(max_num_seqs, UNKNOWN_POSITION, np.int64)
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.int64)
        self.repetition = np.ones(max_num_seqs, np.float32)
        self.presence = np.zeros(max_num_seqs, np.float32)
        self.frequency = np.zeros(max_num_seqs, np.float32)
        self.num_logprobs = np.full(max_num_seqs, -1, np.int64)
        self.num_prompt_logprobs = np.zeros(max_num_seqs, np.int64)
        self.plain_sampling = np.zeros(max_num_seqs, np.bool_)
        self.min_end_positions = np.zeros(max_num_seqs, np.int64)
        self.end_token_ids: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self.token_counts = TokenCounts(max_num_seqs, vocab_size, device)
        self.logit_bias: list[dict[int, float]] = [{} for _ in range(max_num_seqs)]
        self.allowed_words: dict[int, npt.NDArray[np.int32]] = {}
        self.grammars = GrammarTable(max_num_seqs, vocab_size, tokenizer_folder)

    def check_pages(self, slots: npt.NDArray[np.int64], pages: npt.NDArray[np.int64]) -> None:
        """Fail on rows that contradict the table, a bug of the scheduler: on a GPU they would read other memory.

        Args:
            pages: places in the block tables, of the last position that each row computes.
        """
        assert slots.min() >= 0, "a slot is negative"
        assert slots.max() < self.max_num_seqs, f"slot {slots.max()} is out of range"
        assert self.installed[slots].all(), "a slot has no sequence"
        assert (pages < self.num_table_blocks[slots]).all(), "a position is beyond its blocks"

    def check_tokens(
        self, slots: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], token_ids: npt.NDArray[np.int64]
    ) -> None:
        """Fail likewise on tokens that the device does not have."""
        assert token_ids.max() < self.vocab_size, "a token id is outside the vocabulary"
        fed_back = token_ids == FED_BACK
        assert (self.next_positions[slots[fed_back]] == starts[fed_back]).all(), _NOT_SAMPLED

    def check_row(self, slot: int, start: int, page: int, token: int) -> None:
        """Check the only row of a step, as `check_pages` and `check_tokens` do; ``page`` is that of ``start``."""
        assert 0 <= slot < self.max_num_seqs, f"slot {slot} is out of range"
        assert self.installed[slot], "a slot has no sequence"
        assert page < self.num_table_blocks[slot], "a position is beyond its blocks"
        assert token < self.vocab_size, "a token id is outside the vocabulary"
        assert token != FED_BACK or self.next_positions[slot] == start, _NOT_SAMPLED

    def install(self, state: SequenceState) -> None:
        """Put a sequence into its slot, in place of the one before."""
        slot, sampling = state.slot, state.sampling
        assert 0 <= slot < self.max_num_seqs, f"slot {slot} is not in 0..{self.max_num_seqs - 1}"
        assert sampling.greedy or sampling.seed is not None, f"slot {slot}: random sampling without a seed"
        assert all(0 <= token < self.vocab_size for token in state.end_token_ids), (
            f"slot {slot}: an end token is outside the vocabulary"
        )
        self.installed[slot] = True
        self.num_table_blocks[slot] = 0
        self.append_blocks(slot, state.block_ids)
        self.next_positions[slot] = UNKNOWN_POSITION
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = min(sampling.top_k, self.vocab_size) if sampling.top_k > 0 else self.vocab_size
        self.top_p[slot] = max(sampling.top_p, _MIN_TOP_P)
        self.min_p[slot] = sampling.min_p
        self.seeds[slot] = sampling.seed or 0
        self.repetition[slot] = sampling.repetition_penalty
        self.presence[slot] = sampling.presence_penalty
        self.frequency[slot] = sampling.frequency_penalty
        self.num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self.num_prompt_logprobs[slot] = sampling.prompt_logprobs or 0
        self.min_end_positions[slot] = state.min_end_position
        self.end_token_ids[slot] = state.end_token_ids
        truncates = self.top_k[slot] < self.vocab_size or sampling.top_p < 1 or sampling.min_p > 0
        self.logit_bias[slot] = sampling.logit_bias or {}
        assert all(token < self.vocab_size for token in self.logit_bias[slot]), f"slot {slot}: a bias has no token"
        self.grammars.install(state)
        self._install_allowed(slot, sampling.allowed_token_ids)
        steered = bool(sampling.logit_bias) or sampling.grammar is not None or slot in self.allowed_words
        self.plain_sampling[slot] = not truncates and not steered and sampling.logprobs is None
        if sampling.repetition_penalty == 1 and sampling.presence_penalty == 0 and sampling.frequency_penalty == 0:
            self.token_counts.forget(slot)
        else:
            self.plain_sampling[slot] = False
            assert state.history is not None, f"slot {slot}: penalties need the history"
            self.token_counts.install(slot, state.history, state.num_prompt_tokens)

    def _install_allowed(self, slot: int, token_ids: list[int] | None) -> None:
        """Note the only tokens that may be sampled, as a bit mask; None: all."""
        self.allowed_words.pop(slot, None)
        if token_ids is not None:
            assert all(0 <= token < self.vocab_size for token in token_ids), f"slot {slot}: an allowed id has no token"
            bits = np.zeros(-(-self.vocab_size // 32) * 32, np.uint8)
            bits[token_ids] = 1
            self.allowed_words[slot] = np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)

    def append_blocks(self, slot: int, block_ids: list[int]) -> None:
        """Append blocks to a slot's block table."""
        begin = int(self.num_table_blocks[slot])
        end = begin + len(block_ids)
        width = self.block_tables.shape[1]
        assert end <= width, f"slot {slot}: {end} blocks are more than the longest sequence has, {width}"
        assert all(0 <= block < self.num_blocks for block in block_ids), (
            f"slot {slot}: a block of {block_ids} is not in 0..{self.num_blocks - 1}"
        )
        self.block_tables[slot, begin:end] = block_ids
        self.num_table_blocks[slot] = end

    def append_new_blocks(self, rows: list[PlanRow]) -> None:
        """Append the new blocks of a plan's rows to their block tables."""
        for row in rows:
            if row.new_block_ids:
                assert 0 <= row.slot < self.max_num_seqs, f"slot {row.slot} is not in 0..{self.max_num_seqs - 1}"
                self.append_blocks(row.slot, row.new_block_ids)

    def note_sampled(self, slots: torch.Tensor, token_ids: torch.Tensor, penalties: Penalties | None) -> None:
        """Keep a step's tokens (int64, on the device) for the next step of their slots."""
        self.last_token_ids[slots] = token_ids
        if penalties is not None:
            counted = token_ids[penalties.rows]
            self.token_counts.add(penalties.count_rows, counted, penalties.times(counted))
