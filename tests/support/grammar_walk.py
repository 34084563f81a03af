"""Outputs that follow a grammar, with tokens drawn at random from its masks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from hbserve.grammar import Vocabulary
from hbserve.tokenizer import Tokenizer

MAX_TOKENS = 2000
_CLOSING, _OPENING = set(b'"}]:0'), set(b"{[, \n")
_NUM_TRIED = 200


def allowed_tokens(vocabulary: Vocabulary, grammar: str, token_ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the tokens that may come after these."""
    matcher = vocabulary.follow(grammar, ends)
    matcher.advance(token_ids)
    return np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()


def random_output(
    vocabulary: Vocabulary, tokenizer: Tokenizer, grammar: str, end: int, seed: int, num_free: int = 30
) -> list[int]:
    """Follow a grammar with random tokens to its end; return the tokens before ``end``.

    Args:
        num_free: after so many tokens, those that lead to the end of a JSON document are preferred.
    """
    chance, ids, matcher = random.Random(seed), list[int](), vocabulary.follow(grammar, [end])
    while len(ids) < MAX_TOKENS:
        allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()
        assert matcher.problem is None or end not in allowed, matcher.problem
        if end in allowed and (len(allowed) == 1 or len(ids) > num_free or chance.random() < 0.5):
            return ids
        allowed = [token_id for token_id in allowed if token_id != end]
        if len(ids) > num_free or chance.random() < 0.5:
            tried = chance.sample(allowed, min(len(allowed), _NUM_TRIED))
            text_of = {token_id: tokenizer.token_bytes(token_id) for token_id in tried}
            closing = [token_id for token_id, text in text_of.items() if text and set(text) <= _CLOSING]
            allowed = closing or [token_id for token_id, text in text_of.items() if not set(text) & _OPENING] or tried
        ids.append(chance.choice(allowed))
        matcher.advance(ids[-1:])
    raise AssertionError(f"no end in {MAX_TOKENS} tokens")
