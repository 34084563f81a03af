"""The forward pass of an EAGLE-3 head over a batch: where its two inputs come from."""

from __future__ import annotations

import torch
from torch import Tensor

from hbserve.attention.base import Attention
from hbserve.models.eagle3 import Eagle3Head, FeatureStore

HEAD_LAG = 1
"""Positions by which a head's rows lie before the model's: the noise of a guess is that of the model's position."""


class HeadPass:
    """Feeds a head: tokens whose predecessors the model has computed get stored features, guesses the head's own.

    Args:
        store: features of the pool's tokens.
        num_slots: sequences, and one slot more for padding.
    """

    def __init__(self, head: Eagle3Head, store: FeatureStore, num_slots: int) -> None:
        self._head, self._store = head, store
        self._carried = store.carried(num_slots)  # of the guess that is fed back

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        is_fed_back: Tensor | bool,
        slots: Tensor,
        last: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states ``[tokens, hidden]`` for the logits; see `Eagle3Head.guess`.

        Args:
            is_fed_back: which of the tokens are guesses, fed back on the device; or whether all are.
            slots: int64, of the last token of each row.
            last: int64, places of these tokens; None: there is one slot for each token.
        """
        if isinstance(is_fed_back, Tensor):
            stored = self._store.read(attention.slot_mapping)
            features = torch.where(is_fed_back[:, None], self._carried[slots], stored)
        elif is_fed_back:
            features = self._carried[slots]
        else:
            features = self._store.read(attention.slot_mapping)
        hidden, following = self._head.guess(token_ids, positions, features, attention)
        self._carried[slots] = following if last is None else following[last]
        return hidden
