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
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from hbserve.attention import select_attention_backend
from hbserve.attention.base import ScoreRules
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


class Drafting(NamedTuple):
    """A step's guesses that are being made.

    Attributes:
        rows: of the plan. timer: started with the first pass.
        passes: of each, tokens on the device, and the places of those that are guesses.
    """

    rows: list[PlanRow]
    passes: list[tuple[torch.Tensor, list[int]]]
    timer: StepTimer


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
        can_be_captured = self._decoder.can_be_captured and not spec.uncaptured_features
        can_be_captured = can_be_captured and PagedDecode.supports(self._layout) is None
        if self._graphs is not None or not can_be_captured:
            return pool
        heads = spec.num_heads // self._decoder.parallel.size
        cache, scales = self._attention.kv_cache, self._attention.kv_scales
        rules = ScoreRules.of(spec)
        attention = PagedDecode(self._layout, cache, heads, self._table.max_num_seqs, scales, rules)
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
            self._rehearse(msgspec.structs.replace(row, unread=unread))
        graphs, self._graphs = self._graphs, None
        self._rehearse(row)
        self._graphs = graphs

    def _rehearse(self, row: PlanRow) -> None:
        drafting = self.begin([row], lambda: None)
        assert drafting is not None, "the row asks for guesses"
        self.with_guesses(drafting, self._decoder.spec.vocab_size)

    def install(self, state: SequenceState) -> None:
        """Take a sequence in, in place of whatever its slot had. Guesses are sampled by temperature alone."""
        sampling = SamplingParams(temperature=state.sampling.temperature, seed=state.sampling.seed, max_tokens=None)
        plain = {"sampling": sampling, "end_token_ids": [], "min_end_position": 0, "history": None}
        self._table.install(msgspec.structs.replace(state, **plain))

    def begin(self, rows: list[PlanRow], take_turn: Callable[[], object]) -> Drafting | None:
        """Launch what a plan's rows ask for, to be read and guessed; call it for every plan: it notes new blocks, too.

        Args:
            take_turn: called before anything is computed; the device may begin when it returns.

        Returns:
            None: there is nothing to do.
        """
        self._table.append_new_blocks(rows)
        drafting = [row for row in rows if row.num_to_draft]
        reading = [row for row in rows if row.unread is not None and not row.num_to_draft]
        if not drafting and not reading:
            return None
        take_turn()
        timer = StepTimer(self._platform.device)
        timer.start()
        passes = [self._forward([*map(_first, drafting), *map(_reading, reading)])]
        more = [row for row in drafting if row.num_to_draft > 1]
        if more:
            passes += self._chain([_next(row, 1) for row in more], [row.num_to_draft - 1 for row in more])
        return Drafting(rows, passes, timer)

    def with_guesses(self, drafting: Drafting, vocab_size: int) -> tuple[list[PlanRow], Drafted]:
        """Wait for the guesses; return the rows with all of them in their places, and what was done.

        Args:
            vocab_size: of the model that verifies the guesses.
        """
        rows, passes = drafting.rows, drafting.passes
        asked = [row for row in rows if row.num_to_draft]
        sampled = [] if not asked else torch.cat([tokens for tokens, _ in passes]).tolist()  # waits for the device
        guesses: dict[int, list[int]] = {row.slot: [] for row in asked}
        begin = 0
        for number, (tokens, places) in enumerate(passes):
            asking = [row.slot for row in asked if row.num_to_draft > number]
            for slot, place in zip(asking, places, strict=True):
                token = sampled[begin + place]
                guesses[slot].append(token if 0 <= token < vocab_size else 0)
            begin += len(tokens)
        guesses |= {row.slot: row.kept_guesses for row in asked if row.kept_guesses}
        flat = [token for row in asked for token in guesses[row.slot]]
        filled = [_with_guesses(row, guesses[row.slot]) if row.num_to_draft else row for row in rows]
        return filled, Drafted(flat, drafting.timer)

    def _chain(self, rows: list[PlanRow], counts: list[int]) -> list[tuple[torch.Tensor, list[int]]]:
        """Run the passes behind the first one, each with the tokens that the one before has sampled.

        Args:
            rows: of the first of them. counts: of passes, by row.

        Returns:
            As `_forward`, of each pass.
        """
        numbers = range(max(counts))
        placed = [self._placed(row) for row in rows]
        last = [_later(row, count - 1) for row, count in zip(placed, counts, strict=True)]
        if self._graphs is not None and self._graphs.fits(placed) and self._graphs.fits(last):
            tokens = self._graphs.launch_chain(placed, counts)
            places = [[place for place, count in enumerate(counts) if count > number] for number in numbers]
            return [*zip(tokens, places, strict=True)]
        passes = []
        for number in numbers:
            going_on = [row for row, count in zip(rows, counts, strict=True) if count > number]
            passes.append(self._forward([_later(row, number) for row in going_on]))
        return passes

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

    def _placed(self, row: PlanRow) -> PlanRow:
        """Return a row where its KV lies."""
        return row

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


def _later(row: PlanRow, number: int) -> PlanRow:
    """Return the row of one token so many passes later."""
    return msgspec.structs.replace(row, start=row.start + number)


def _reading(row: PlanRow) -> PlanRow:
    """Return the row of a pass that only reads."""
    assert row.unread is not None, "it reads something"
    return _row(row.slot, row.unread_start, row.unread, samples=False)


def _row(slot: int, start: int, token_ids: list[int], samples: bool) -> PlanRow:
    return PlanRow(slot, start, len(token_ids), token_ids, [], samples)


def _with_guesses(row: PlanRow, guesses: list[int]) -> PlanRow:
    assert row.token_ids is not None, "a row with a draft has its tokens"
    return msgspec.structs.replace(row, token_ids=[*row.token_ids[: -len(guesses)], *guesses])
