"""Scores of prompt tokens: logits in pieces of rows, however many there are."""

from __future__ import annotations

import pytest
import torch

from hbserve.engine import prompt_scores
from hbserve.engine.prompt_scores import ScoredTokens, score

VOCAB_SIZE = 50


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 7, 100])
def test_pieces_of_rows_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int) -> None:
    monkeypatch.setattr(prompt_scores, "_MAX_LOGITS", rows_at_a_time * VOCAB_SIZE)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(12, 8, generator=generator)
    head = torch.randn(VOCAB_SIZE, 8, generator=generator)
    places = torch.tensor([0, 1, 2, 5, 6, 7, 8])
    token_ids = torch.tensor([3, 49, 0, 7, 7, 11, 20])
    sizes = []

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ head.T

    scored = ScoredTokens(places, token_ids, [(3, 0), (4, 2)])
    first, second = score(hidden, scored, logits_of, VOCAB_SIZE).to_lists()
    assert max(sizes) <= rows_at_a_time
    expected = (hidden @ head.T).log_softmax(-1)[places]
    assert (len(first), len(second)) == (3, 4)
    assert all(entry.top_ids == [] for entry in first)
    for entry, row, token_id in zip([*first, *second], expected, token_ids.tolist(), strict=True):
        assert entry.token == pytest.approx(row[token_id].item(), abs=1e-5)
        assert entry.rank == 1 + int((row > row[token_id]).sum())
    for entry, row in zip(second, expected[3:], strict=True):
        assert entry.top_ids == row.topk(2).indices.tolist()
        assert entry.top == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)
