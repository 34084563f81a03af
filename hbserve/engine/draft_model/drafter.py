"""The draft model of a worker: a small model of the same vocabulary that guesses the next tokens at the head of a step.

It runs in the thread that launches steps. A step with rows that ask for guesses goes on like this::

    read      one forward pass over the tokens that the draft model has not read, and the row's last token ─► guess 1
    guess     one forward pass for each further guess, fed back on the device                              ─► guess 2, 3
    verify    the guesses, on the host now, take their places in the rows; the step goes on as if the plan had had them

So grammars, penalties and tensor parallelism see nothing but drafts, and the scheduler learns of the guesses with the
result. The draft model samples with the seeds and temperatures of the sequences. The noise of a position is the same
for both models, so the guess is often right at every temperature. Its KV lies in blocks with the ids of the sequence's
blocks (`hbserve.engine.draft_model.arenas`). Wrong or missing KV costs right guesses, never a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from hbserve.attention import select_attention_backend
from hbserve.config import Config
from hbserve.engine.batch import StepBatch, build_batch
from hbserve.engine.draft_model.arenas import DraftArenas, draft_dtype
from hbserve.engine.draft_model.head_pass import HeadPass
from hbserve.engine.pending_step import Drafted, StepTimer
from hbserve.engine.sampler import SamplingBatch, sample
from hbserve.engine.sequence_table import SequenceTable
from hbserve.messages.worker import TO_BE_DRAFTED, PlanRow, SequenceState
from hbserve.models.decoder import Decoder
from hbserve.platform import Platform
from hbserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hbserve.engine.decode_graphs import DecodeGraphs


class ModelDrafter:
    """A draft model with its KV and its own view of the sequences: block tables, seeds and temperatures.

    Args:
        decoder: the draft model.
        table: of the model that it drafts for.
        num_blocks: of the arena.
    """

    _head: HeadPass | None = None
    """The forward pass of a head; None: the draft model is a model."""

    def __init__(
        self,
        config: Config,
        arenas: DraftArenas,
        decoder: Decoder,
        table: SequenceTable,
        num_blocks: int,
        platform: Platform,
    ) -> None:
        spec, self._layout = arenas.part.spec, arenas.part.layout
        self._platform, self._config = platform, config
        self._decoder = decoder
        kv_cache = self._layout.view(arenas.kv, num_blocks)
        name = config.model.attention_backend
        backend = select_attention_backend(name, spec, draft_dtype(config, spec), platform)
        self._attention = backend(spec, self._layout, kv_cache, platform, decoder.parallel.size)
        self._table = SequenceTable(
            max_num_seqs=table.max_num_seqs,
            max_blocks_per_seq=table.block_tables.shape[1],
            num_blocks=num_blocks,
            vocab_size=spec.vocab_size,
            device=platform.device,
        )
        self._graphs: DecodeGraphs | None = None
        self._unused_timer = StepTimer(platform.device)

    def capture(self, pool: Any) -> Any:
        """Capture its decode steps if that can be done; returns the memory pool of all graphs."""
        from hbserve.attention.paged_decode import PagedDecode
        from hbserve.engine.decode_graphs import DecodeGraphs

        spec = self._decoder.spec
        reason = PagedDecode.supports(spec, self._layout)
        if self._graphs is not None or spec.unfused_features or reason is not None:
            return pool
        heads = spec.num_heads // self._decoder.parallel.size
        cache, scales = self._attention.kv_cache, self._attention.kv_scales
        attention = PagedDecode(self._layout, cache, heads, self._table.max_num_seqs, scales)
        max_len = self._config.cuda_graph.max_seq_len
        self._graphs = DecodeGraphs(
            self._decoder, attention, self._table, max_len, defers=False, drafts=True, pool=pool, head=self._head
        )
        return self._graphs.pool

    @torch.inference_mode()
    def warm_up(self, block: int) -> None:
        """Read and guess a little, in a block that no sequence has yet: the first real guess finds kernels loaded."""
        sampling = SamplingParams(temperature=0, max_tokens=None)
        self.install(SequenceState(0, [block], sampling, [], 0, 0))
        guess = [TO_BE_DRAFTED] * 2
        row = PlanRow(0, 1, 3, [0, *guess], [], True, num_drafts=2)
        for unread in (None, [0]):
            self.draft([msgspec.structs.replace(row, unread=unread)], self._decoder.spec.vocab_size, lambda: None)
        graphs, self._graphs = self._graphs, None
        self.draft([row], self._decoder.spec.vocab_size, lambda: None)
        self._graphs = graphs

    def install(self, state: SequenceState) -> None:
        """Take a sequence in, in place of whatever its slot had. Guesses are sampled by temperature alone."""
        sampling = SamplingParams(temperature=state.sampling.temperature, seed=state.sampling.seed, max_tokens=None)
        plain = {"sampling": sampling, "end_token_ids": [], "min_end_position": 0, "history": None}
        self._table.install(msgspec.structs.replace(state, **plain))

    def draft(
        self, rows: list[PlanRow], vocab_size: int, take_turn: Callable[[], object]
    ) -> tuple[list[PlanRow], Drafted | None]:
        """Read and guess what a plan's rows ask for; call it for every plan, because it notes new blocks, too.

        Args:
            vocab_size: of the model that verifies the guesses.
            take_turn: called before anything is computed; the device may begin when it returns.

        Returns:
            The rows with all guesses in their places, and what was done; None: nothing was.
        """
        self._table.append_new_blocks(rows)
        drafting = [row for row in rows if row.num_to_draft]
        reading = [row for row in rows if row.unread is not None and not row.num_to_draft]
        if not drafting and not reading:
            return rows, None
        take_turn()
        timer = StepTimer(self._platform.device)
        passes = [self._forward([*map(_first, drafting), *map(_reading, reading)])]
        for number in range(1, max((row.num_to_draft for row in drafting), default=0)):
            passes.append(self._forward([_next(row, number) for row in drafting if row.num_to_draft > number]))
        sampled = [] if not drafting else torch.cat([tokens for tokens, _ in passes]).tolist()  # waits for the device
        guesses: dict[int, list[int]] = {row.slot: [] for row in drafting}
        begin = 0
        for number, (tokens, places) in enumerate(passes):
            asking = [row.slot for row in drafting if row.num_to_draft > number]
            for slot, place in zip(asking, places, strict=True):
                token = sampled[begin + place]
                guesses[slot].append(token if 0 <= token < vocab_size else 0)
            begin += len(tokens)
        flat = [token for row in drafting for token in guesses[row.slot]]
        return [_with_guesses(row, guesses[row.slot]) if row.num_to_draft else row for row in rows], Drafted(
            flat, timer
        )

    def _forward(self, rows: list[PlanRow]) -> tuple[torch.Tensor, list[int]]:
        """Run a forward pass; the token that each row samples last is fed back to its slot.

        Returns:
            Sampled tokens, int64 on the device, and the places of the last ones of the rows that sample.
        """
        if self._graphs is not None:
            wide = [msgspec.structs.replace(row, num_drafts=row.num_tokens - 1) if row.sample else row for row in rows]
            if self._graphs.fits(wide):
                sampled, _ = self._graphs.launch(wide, lambda: None, self._unused_timer)
                places = itertools.accumulate(row.num_tokens for row in wide)
                return sampled.token_ids.clone(), [place - 1 for place in places]
        batch = build_batch(rows, self._table, self._layout.block_size, self._platform.device)
        self._attention.begin(batch.attention)
        hidden = self._hidden(rows, batch)
        if not batch.num_logprobs:
            return batch.sampled_slots, []
        sampled = sample(self._decoder.logits(hidden[batch.sampled_tokens]), self._sampling(batch))
        self._table.note_sampled(batch.sampled_slots, sampled.token_ids, None)
        return sampled.token_ids, [*range(len(sampled.token_ids))]

    def _hidden(self, rows: list[PlanRow], batch: StepBatch) -> torch.Tensor:
        """Compute hidden states of a batch that attention has begun."""
        return self._decoder.forward(batch.token_ids, batch.positions, self._attention)

    def _sampling(self, batch: StepBatch) -> SamplingBatch:
        """Return how a batch is sampled."""
        return batch.sampling


def _first(row: PlanRow) -> PlanRow:
    """Return the row of the pass that makes the first guess: it reads up to the row's last known token."""
    assert row.token_ids is not None, "a row with a draft has its tokens"
    known = row.token_ids[: row.num_tokens - row.num_drafts]
    unread = row.unread or []
    assert not unread or row.unread_start + len(unread) == row.start, (
        f"slot {row.slot}: tokens before its row are unread"
    )
    return _row(row.slot, row.start - len(unread), [*unread, *known], samples=True)


def _next(row: PlanRow, number: int) -> PlanRow:
    """Return the row of the pass that makes the guess of this number, from 0."""
    last = row.start + row.num_tokens - row.num_drafts - 1
    return PlanRow(row.slot, last + number, 1, None, [], sample=True)


def _reading(row: PlanRow) -> PlanRow:
    """Return the row of a pass that only reads."""
    assert row.unread is not None, "it reads something"
    return _row(row.slot, row.unread_start, row.unread, samples=False)


def _row(slot: int, start: int, token_ids: list[int], samples: bool) -> PlanRow:
    return PlanRow(slot, start, len(token_ids), token_ids, [], samples)


def _with_guesses(row: PlanRow, guesses: list[int]) -> PlanRow:
    assert row.token_ids is not None, "a row with a draft has its tokens"
    return msgspec.structs.replace(row, token_ids=[*row.token_ids[: -len(guesses)], *guesses])
