"""Decode steps as CUDA graphs: one launch instead of some hundred.

For each of several batch sizes (`hbserve.engine.graph_sizes`) the whole step is captured: fed-back tokens, forward
pass, logits, sampling, and the copy of the sampled tokens into the sequence table. A step copies its inputs into fixed
buffers with one transfer from pinned memory, and replays the smallest graph that holds its rows. The remaining rows are
padding and store nothing. A sequence with a draft has a row of the graph for each of its tokens; all of them are stored
before any is read. Attention reads the sequence once for several of its rows: a run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hbserve.attention.base import PageTables
from hbserve.attention.decode_pieces import join_rows
from hbserve.attention.paged_decode import DecodeInputs, PagedDecode
from hbserve.engine.capture import Parts, capture_in_parts, compiling, run_through, run_to_capture
from hbserve.engine.draft_model.head_pass import HEAD_LAG, HeadPass
from hbserve.engine.fast_sampler import fast_sample
from hbserve.engine.graph_sizes import GraphSizes, captured_batch_sizes, draft_batch_sizes
from hbserve.engine.pending_step import StepTimer
from hbserve.engine.rounds.graph_rounds import GraphRounds, StepGraph, max_end
from hbserve.engine.sampler import Sampled, sample
from hbserve.engine.sampling_batch import samples_of, sampling_arrays, sampling_batch
from hbserve.engine.sequence_table import FED_BACK, UNKNOWN_POSITION, SequenceTable
from hbserve.engine.staging import STEP_FIELDS, StepInputs, to_device
from hbserve.engine.step_board import StepBoard
from hbserve.messages.worker import PlanRow
from hbserve.models.decoder import Decoder

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """Captured decode steps of one worker.

    Args:
        max_seq_len: a batch with a longer sequence does not fit, and runs eagerly.
        defers: capture only some sizes now, and leave the others to `capture`.
        drafts: of a draft model: few sizes, and the last sample of each row is fed back (`Samples.feeds_every_row`).
        pool: memory pool of graphs that never run at the same time; None: a new one.
        head: the forward pass, if ``decoder`` is a head that also reads hidden states; None: it is a model.

    Attributes:
        sizes: the batch sizes with and without a graph.
        rounds: of the step that was launched last.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedDecode,
        table: SequenceTable,
        max_seq_len: int,
        defers: bool,
        drafts: bool = False,
        pool: Any = None,
        head: HeadPass | None = None,
    ) -> None:
        self._head = head
        self._feeds_every_row, self._first_pool = drafts, pool
        self._decoder, self._attention, self._table = decoder, attention, table
        self._block_size = attention.layout.block_size
        self._max_seq_len = max_seq_len
        sizes = draft_batch_sizes(table.max_num_seqs) if drafts else captured_batch_sizes(table.max_num_seqs)
        self.sizes = GraphSizes(sizes, defers)
        max_pages = table.max_num_seqs * table.block_tables.shape[1] + table.max_num_seqs
        device = table.last_token_ids.device
        self._inputs = StepInputs(table.max_num_seqs, attention.capacity(table.max_num_seqs), max_pages, device)
        # All graphs share it: a step reads it, if at all, before the next replay.
        self._logits = decoder.lm_head.new_empty(table.max_num_seqs, decoder.num_logits)
        self._sample_counters = torch.zeros(table.max_num_seqs, dtype=torch.int32, device=device)
        self._graphs: dict[int, StepGraph] = {}
        self._short_graph: StepGraph | None = None  # of one row of a sequence of up to `max_short_tokens`
        self.rounds = GraphRounds(self._inputs, self._block_size, max_seq_len, table.vocab_size)
        self._capture_first(device, defers)

    @property
    def pool(self) -> Any:
        """The memory pool of the graphs."""
        return self._graphs[self.sizes.max].graph.pool()

    def _capture_first(self, device: torch.device, is_awaited: bool) -> None:
        started = time.perf_counter()
        before = torch.cuda.mem_get_info(device)[0]
        if is_awaited and self._decoder.can_skip_kernels:  # else others serve, and need the device
            with compiling(device):
                for size in self.sizes.missing:  # all: what is compiled later delays the steps of that time
                    self._begin(size)
                    self._step(size, self._decoder.typical_layers)
        for size in self.sizes.first:
            run_through(self.capture(size))
        if not self._feeds_every_row:  # compile it now, on padding
            self.rounds.prepare(PlanRow(self._table.padding_slot, 0, 1, [0], [], True))
        used = before - torch.cuda.mem_get_info(device)[0]
        seconds = time.perf_counter() - started
        logger.info(
            "captured decode graphs for %d batch sizes up to %d in %.1f s, %.2f GiB; %d follow",
            *(len(self.sizes.first), self.sizes.max, seconds, used / (1 << 30), len(self.sizes.missing)),
        )

    def capture(self, size: int) -> Parts[None]:
        """Capture the steps of a batch size, on all ranks of a group in the same order.

        The first part runs a rehearsal, and no later part runs anything. So steps may be launched between the parts, on
        another stream (`can_capture_beside_steps`).
        """
        self._graphs[size] = yield from self._capture(size, self.pool if self._graphs else self._first_pool)
        if size == 1 and self._attention.max_short_tokens:
            self._short_graph = yield from self._capture(size, self.pool, is_short=True)
        self.sizes.add(size)

    @contextmanager
    def of_layers(self, layers: list[int]) -> Iterator[None]:
        """Give the smallest graph only these layers while the body runs, so that a rehearsal takes little time."""
        size = self.sizes.min_captured
        whole = self._graphs[size], self._short_graph
        self._graphs[size], self._short_graph = run_through(self._capture(size, self.pool, layers)), None
        try:
            yield
        finally:
            self._graphs[size], self._short_graph = whole

    def _capture(
        self, size: int, pool: Any, layers: list[int] | None = None, is_short: bool = False
    ) -> Parts[StepGraph]:
        self._begin(size, is_short)
        run_to_capture(lambda: self._step(size, self._decoder.typical_layers))
        yield
        graph: Any = torch.cuda.CUDAGraph()
        token_ids = yield from capture_in_parts(graph, pool, self._step_parts(size, layers))
        return StepGraph(graph, token_ids)

    def _begin(self, size: int, is_short: bool = False) -> None:
        """Prepare a step of padding."""
        self._copy_padding(size)
        tensor = self._inputs.tensor
        self._attention.begin(
            DecodeInputs(
                tensor("pieces", self._attention.capacity(size)),
                tensor("first_piece", size),
                tensor("first_row", size + 1),
                tensor("indptr", size + 1),
                self._inputs.indices,
                tensor("positions", size),
                tensor("num_stored", size),
                tensor("slot_mapping", size),
                tensor("chunk_len", 1),
            ),
            is_short,
        )

    def _copy_padding(self, size: int) -> None:
        arrays = {field.name: np.empty(0, field.dtype) for field in STEP_FIELDS}
        arrays["indptr"] = np.arange(size + 1, dtype=np.int32)
        arrays["slots"] = np.full(size, self._table.padding_slot, np.int64)
        arrays |= _pieces(self._attention, np.ones(size, np.int32), np.zeros(size, np.int64))
        self._inputs.fill(arrays, np.zeros(size, np.int32), size)
        self._inputs.copy()

    def _step(self, size: int, layers: list[int]) -> torch.Tensor:
        return run_through(self._step_parts(size, layers))

    def _step_parts(self, size: int, layers: list[int] | None) -> Parts[torch.Tensor]:
        inputs = self._inputs
        slots, given = inputs.tensor("slots", size), inputs.tensor("token_ids", size)
        positions = inputs.tensor("positions", size)
        last, sampled_after = self._table.last_token_ids, positions
        if self._head is None:
            stream = self._decoder.embed_next(given, last, slots)
            yield from self._decoder.pass_layers(stream, positions, self._attention, layers=layers)
            logits = self._decoder.stream_logits(stream, self._logits[:size])
        else:
            is_fed_back = given == FED_BACK
            token_ids = torch.where(is_fed_back, last[slots], given)
            sampled_after = positions + HEAD_LAG
            hidden = self._head.forward(token_ids, positions, self._attention, is_fed_back, slots)
            logits = self._decoder.shard_logits(hidden, self._logits[:size])
        temperatures, seeds = inputs.tensor("temperatures", size), inputs.tensor("seeds", size)
        parallel, vocab_size = self._decoder.logits_parallel, self._decoder.spec.vocab_size
        counters = self._sample_counters
        return fast_sample(logits, temperatures, seeds, sampled_after, slots, last, counters, vocab_size, parallel)

    def fits(self, rows: list[PlanRow]) -> bool:
        """Return whether a plan's rows are a decode step that is captured."""
        return (
            0 < sum([row.num_samples for row in rows]) <= self.sizes.max
            and all(row.num_tokens == row.num_samples for row in rows)
            and max(row.start + row.num_drafts for row in rows) < self._max_seq_len
        )

    def are_plain(self, rows: list[PlanRow]) -> bool:
        """Return whether the samples of rows need nothing but the graph: what is sampled does not depend on guesses."""
        slots = np.array([row.slot for row in rows], np.int64)
        starts = np.array([row.start for row in rows], np.int64)
        return bool((self._table.plain_sampling[slots] & (starts + 1 >= self._table.min_end_positions[slots])).all())

    def launch(
        self,
        rows: list[PlanRow],
        take_turn: Callable[[], StepBoard | None],
        timer: StepTimer,
        rounds: int = 1,
        with_guesses: Callable[[], list[PlanRow]] | None = None,
    ) -> tuple[Sampled, list[int]]:
        """Launch a step that `fits`; its blocks have been appended.

        Args:
            rounds: how often the step may be done, at most. If its rows allow it, `rounds.repeat` launches the others.
            take_turn: called when everything is prepared; the device may begin when it returns. It returns the board
                with the tokens that other workers have sampled.
            timer: started when the device gets its work.
            with_guesses: called last; it returns the rows with their guesses, which are `TO_BE_DRAFTED` so far. Only
                for rows that `are_plain`. None: all guesses are known.

        Returns:
            The sampled tokens in the order of the rows, and the number of logprobs of each sample.
        """
        table = self._table
        if len(rows) == 1 and rounds == 1 and self._is_lone(rows[0]):
            return self._launch_lone(rows[0], take_turn, timer)
        samples = samples_of(rows, self._feeds_every_row)
        num_rows = len(samples.rows)
        size = self.sizes.choose(num_rows)
        graph = self._graphs[size]
        places = np.array([(row.slot, row.start, row.start + row.num_tokens) for row in rows], np.int64)
        slots, row_starts, ends = np.ascontiguousarray(places[samples.rows].T)
        starts = ends - 1 - samples.before_end
        plain = table.plain_sampling[slots] & (starts + 1 >= table.min_end_positions[slots])
        repeats = rounds > 1 and not self._feeds_every_row and bool(plain.all()) and self.rounds.allow(rows, rounds)
        last = starts
        if repeats:  # pages and pieces reach as far as the rows can get
            max_ends = np.array([max_end(row, rounds) for row in rows], np.int64)[samples.rows]
            last = max_ends - 1 - samples.before_end
        table.check_pages(slots, last // self._block_size)

        page_of_token = starts // self._block_size
        block_tables = table.block_tables[slots, : int(last.max()) // self._block_size + 1]
        blocks = block_tables[np.arange(num_rows), page_of_token].astype(np.int64)
        context_lens, block_tables = _pad(last + 1, block_tables, size)
        pages = PageTables.build(context_lens, block_tables, self._block_size)
        fed_slots = samples.fed_slots(table, slots)
        padded_slots = np.full(size, table.padding_slot, np.int64)
        padded_slots[:num_rows] = fed_slots
        elsewhere = np.flatnonzero(np.array([row.sampled_elsewhere for row in rows])[samples.rows])
        token_ids = _token_ids(rows)
        arrays = {
            "token_ids": token_ids,
            "positions": starts,
            "num_stored": row_starts,
            "slots": padded_slots,
            "slot_mapping": blocks * self._block_size + starts % self._block_size,
            "seeds": table.seeds[slots],
            "temperatures": table.temperature[slots],
            "indptr": pages.indptr,
            **_pieces(self._attention, context_lens, starts - row_starts),
        }
        self._inputs.fill(arrays, pages.indices, size)
        board = take_turn()
        if elsewhere.size:
            assert board is not None, "a worker without a board has sampled every token itself"
            token_ids[elsewhere] = board.tokens(slots[elsewhere], starts[elsewhere])
            self._inputs.fill_in_tokens(token_ids)
        if with_guesses is not None:
            token_ids = _token_ids(with_guesses())
            self._inputs.fill_in_tokens(token_ids)
        table.check_tokens(slots, starts, token_ids)
        timer.start()
        self._inputs.copy()
        graph.graph.replay()
        samples.note_positions(table, slots, starts + 1)
        num_logprobs = table.num_logprobs[slots].tolist()
        if repeats:
            self.rounds.begin(graph, rows, pages.indptr, size, num_rows, num_logprobs)
            table.next_positions[slots] = UNKNOWN_POSITION  # how many rounds count, only the results say
        if plain.all():
            return Sampled(graph.token_ids[:num_rows], None), num_logprobs
        # Penalties, truncation, biases and grammars need the general sampler, on the graph's logits.
        arrays = sampling_arrays(table, slots, starts + 1, samples.drafts)
        tensors = to_device({"slots": fed_slots, **arrays}, self._logits.device)
        batch = sampling_batch(table, slots, tensors)
        sampled = sample(self._decoder.all_logits(self._logits[:num_rows]), batch)
        table.note_sampled(tensors["slots"], sampled.token_ids, batch.penalties)
        return sampled, num_logprobs

    def _is_lone(self, row: PlanRow) -> bool:
        """Whether `_launch_lone` can launch a step of nothing but this row."""
        table, slot = self._table, row.slot
        is_plain = table.plain_sampling[slot] and row.start + 1 >= table.min_end_positions[slot]
        has_own_graph = self._head is None and self.sizes.min_captured == 1 and self._attention.needs_no_pieces(1)
        return bool(is_plain) and has_own_graph and not row.num_drafts and not row.sampled_elsewhere

    def _launch_lone(
        self, row: PlanRow, take_turn: Callable[[], StepBoard | None], timer: StepTimer
    ) -> tuple[Sampled, list[int]]:
        """Launch a step of one row, as `launch` does: the steps of a small model are as short as its work for a batch.

        The attention kernels of one row read no pieces.
        """
        table, slot, start = self._table, row.slot, row.start
        page, offset = divmod(start, self._block_size)
        token = FED_BACK if row.token_ids is None else row.token_ids[0]
        table.check_row(slot, start, page, token)
        blocks = table.block_tables[slot, : page + 1]
        values = {
            "token_ids": token,
            "positions": start,
            "num_stored": start,
            "slots": slot,
            "slot_mapping": int(blocks[page]) * self._block_size + offset,
            "seeds": table.seeds[slot],
            "temperatures": table.temperature[slot],
        }
        self._inputs.fill_row(values, blocks)
        graph = self._graphs[self.sizes.choose(1)]
        if self._short_graph is not None and start < self._attention.max_short_tokens:
            graph = self._short_graph
        take_turn()
        timer.start()
        self._inputs.copy()
        graph.graph.replay()
        table.next_positions[slot] = start + 1
        return Sampled(graph.token_ids, None), [-1]

    def launch_chain(self, rows: list[PlanRow], counts: list[int]) -> list[torch.Tensor]:
        """Launch passes of a draft model that follow each other: each reads the token that the one before has sampled.

        The host prepares all of them at once.

        Args:
            rows: of the first pass, which `fits`; each has the one token that was sampled last.
            counts: of passes of each row, at least 1. A row with fewer than others stays at its last token then.

        Returns:
            The sampled tokens of each pass, int64 ``[rows]``.
        """
        table, page = self._table, self._block_size
        num_rows, size = len(rows), self.sizes.choose(len(rows))
        graph = self._graphs[size]
        slots = np.array([row.slot for row in rows], np.int64)
        starts = np.array([row.start for row in rows], np.int64)
        numbers, ends = np.arange(max(counts))[:, None], np.array(counts)
        positions = starts + np.minimum(numbers, ends - 1)
        last = positions[-1]
        table.check_pages(slots, last // self._block_size)
        fed_back = np.full(num_rows, FED_BACK, np.int64)
        table.check_tokens(slots, starts, fed_back)
        block_tables = table.block_tables[slots, : int(last.max()) // page + 1]
        blocks = block_tables[np.arange(num_rows), positions // page].astype(np.int64)
        stored = np.where(numbers < ends, blocks * page + positions % page, -1)
        context_lens, block_tables = _pad(last + 1, block_tables, size)
        pages = PageTables.build(context_lens, block_tables, page)
        padded_slots = np.full(size, table.padding_slot, np.int64)
        padded_slots[:num_rows] = slots
        arrays = {
            "token_ids": fed_back,
            "positions": starts,
            "num_stored": starts,
            "slots": padded_slots,
            "slot_mapping": stored[0],
            "seeds": table.seeds[slots],
            "temperatures": table.temperature[slots],
            "indptr": pages.indptr,
            **_pieces(self._attention, context_lens, np.zeros(num_rows, np.int64)),
        }
        self._inputs.fill(arrays, pages.indices, size)
        self._inputs.copy()
        tensors = to_device({"positions": positions, "slot_mapping": stored}, self._logits.device)
        sampled = []
        for number in range(len(positions)):
            if number:
                self._inputs.tensor("positions", num_rows).copy_(tensors["positions"][number])
                self._inputs.tensor("num_stored", num_rows).copy_(tensors["positions"][number])
                self._inputs.tensor("slot_mapping", num_rows).copy_(tensors["slot_mapping"][number])
            graph.graph.replay()
            sampled.append(graph.token_ids[:num_rows].clone())
        table.next_positions[slots] = UNKNOWN_POSITION
        return sampled


def _token_ids(rows: list[PlanRow]) -> npt.NDArray[np.int64]:
    """Return the tokens of rows, one after the other."""
    fed_back = (FED_BACK,)
    return np.array([token for row in rows for token in (row.token_ids or fed_back)], np.int64)


def _pad(
    context_lens: npt.NDArray[np.int64], block_tables: npt.NDArray[np.int32], size: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Append rows of one token in block 0 up to ``size`` rows; their results are not used."""
    extra, lens = size - len(context_lens), context_lens.astype(np.int32)
    if not extra:
        return lens, block_tables
    return np.pad(lens, (0, extra), constant_values=1), np.pad(block_tables, ((0, extra), (0, 0)))


def _pieces(
    attention: PagedDecode, context_lens: npt.NDArray[np.int32], places: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.int32]]:
    """Join rows with ``context_lens [size]`` to runs, and cut those; ``places``: see `join_rows`."""
    size = len(context_lens)
    first_row = join_rows(places, size, attention.max_run_rows)
    cut = attention.cut(context_lens[first_row[1:] - 1], first_row)
    return {
        "pieces": cut.pieces,
        "first_piece": cut.first_piece,
        "first_row": first_row,
        "chunk_len": np.array([cut.chunk_len], np.int32),
    }
