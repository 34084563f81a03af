"""The drafter of an EAGLE-3 head: a draft model that reads each token with the model's hidden states before it.

The model leaves a feature for the KV slot of every token that it computes (`hbserve.models.eagle3.FeatureStore`). To
read the token of position p the head needs the feature of p - 1, and its KV lies at that position::

    position              0      1      2      3
    model's tokens        the    cat    sat    on
    model's features      f0     f1     f2     f3
    head reads            cat f0 sat f1 on f2             so its rows are those of a draft model, one position earlier

Features of guesses are the head's own output. The model overwrites them when it verifies the guesses, and the head
reads those that were right again (`StepPlan.rereads`). The features are in the model's blocks, so a transfer or a KV
tier brings them with the KV. The head's own KV stays where it is: it reads a sequence again where that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import torch

from hbserve.config import Config
from hbserve.engine.batch import StepBatch
from hbserve.engine.draft_model.arenas import DraftArenas
from hbserve.engine.draft_model.drafter import ModelDrafter
from hbserve.engine.draft_model.head_pass import HEAD_LAG, HeadPass
from hbserve.engine.sampler import SamplingBatch
from hbserve.engine.sequence_table import SequenceTable
from hbserve.messages.worker import PlanRow
from hbserve.models.decoder import Decoder
from hbserve.models.eagle3 import Eagle3Head, FeatureStore, HiddenTaps
from hbserve.models.eagle3_spec import Eagle3Spec
from hbserve.platform import Platform


class HeadDrafter(ModelDrafter):
    """A head with its KV and its view of the sequences; it has the model store features from now on.

    Args:
        head: the head. weights: its own.
        model: that it drafts for. table: of the model.
        num_blocks: of the arena.
    """

    def __init__(
        self,
        config: Config,
        arenas: DraftArenas,
        head: Eagle3Spec,
        model: Decoder,
        table: SequenceTable,
        num_blocks: int,
        platform: Platform,
    ) -> None:
        weights: Mapping[str, torch.Tensor] = arenas.part.table.views(arenas.weights)
        decoder = Eagle3Head(head, weights, model.embedding, model.parallel)
        assert arenas.features is not None, "blocks have room for a head's features"
        store = FeatureStore(arenas.features)
        model.taps = HiddenTaps(head, weights, store, decoder.ops)
        self._head = HeadPass(decoder, store, table.max_num_seqs + 1)
        super().__init__(config, arenas, decoder, table, num_blocks, platform)

    def _forward(self, rows: list[PlanRow]) -> tuple[torch.Tensor, list[int]]:
        placed = [row for row in map(self._placed, rows) if row.num_tokens]
        return super()._forward(placed) if placed else (self._table.last_token_ids[:0], [])

    def _placed(self, row: PlanRow) -> PlanRow:
        """Return a row where the head has it; the first token of a sequence, with no feature before it, falls out."""
        if row.start:
            return msgspec.structs.replace(row, start=row.start - HEAD_LAG)
        assert row.token_ids is not None, f"slot {row.slot}: a guess without a feature"
        token_ids = row.token_ids[HEAD_LAG:]
        assert token_ids or not row.sample, f"slot {row.slot}: a guess without a feature"
        return msgspec.structs.replace(row, start=0, num_tokens=len(token_ids), token_ids=token_ids)

    def _hidden(self, rows: list[PlanRow], batch: StepBatch) -> torch.Tensor:
        assert self._head is not None, "it has a forward pass"
        is_fed_back = rows[0].token_ids is None  # of all rows of a pass, or of none
        ends = batch.sampled_slots, batch.sampled_tokens
        return self._head.forward(batch.token_ids, batch.positions, self._attention, is_fed_back, *ends)

    def _sampling(self, batch: StepBatch) -> SamplingBatch:
        """Sample with the noise of the positions that the guesses are for."""
        random = batch.sampling.random
        if random is None:
            return batch.sampling
        return replace(batch.sampling, random=replace(random, positions=random.positions + HEAD_LAG))


def make_drafter(
    config: Config, arenas: DraftArenas, model: Decoder, table: SequenceTable, num_blocks: int, platform: Platform
) -> ModelDrafter:
    """Make the drafter of a worker: of a head, or of a draft model. Arguments as `HeadDrafter`."""
    part = arenas.part
    if part.head is not None:
        return HeadDrafter(config, arenas, part.head, model, table, num_blocks, platform)
    decoder = Decoder(part.spec, part.table.views(arenas.weights), model.parallel)
    return ModelDrafter(config, arenas, decoder, table, num_blocks, platform)
