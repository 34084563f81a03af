"""Outputs that follow a grammar, with tokens drawn at random from its masks."""

from __future__ import annotations

import random

import numpy as np

from hbserve.grammar import Vocabulary
from hbserve.tokenizer import Tokenizer

MAX_TOKENS = 2000
_CLOSING, _OPENING = set(b'"}]:0'), set(b"{[, \n")
_NUM_TRIED = 200


def random_output(
    vocabulary: Vocabulary, tokenizer: Tokenizer, grammar: str, end: int, seed: int, num_free: int = 30
) -> list[int]:
    """Follow a grammar with random tokens to its end; return the tokens before ``end``.

    Args:
        num_free: after so many tokens, those that lead to the end of a JSON document are preferred.
    """
    chance, ids, matcher = random.Random(seed), list[int](), vocabulary.follow(grammar, [end])
    while len(ids) < MAX_TOKENS:
        allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))
        may_end = bool((allowed == end).any())
        assert matcher.problem is None or not may_end, matcher.problem
        if may_end and (len(allowed) == 1 or len(ids) > num_free or chance.random() < 0.5):
            return ids
        allowed = allowed[allowed != end]
        tried = allowed if len(allowed) <= _NUM_TRIED else allowed[chance.choices(range(len(allowed)), k=_NUM_TRIED)]
        choices: list[int] = tried.tolist()
        if len(ids) > num_free or chance.random() < 0.5:
            text_of = {token_id: tokenizer.token_bytes(token_id) for token_id in choices}
            closing = [token_id for token_id, text in text_of.items() if text and set(text) <= _CLOSING]
            choices = closing or [token_id for token_id, text in text_of.items() if not set(text) & _OPENING] or choices
        ids.append(chance.choice(choices))
        matcher.advance(ids[-1:])
    raise AssertionError(f"no end in {MAX_TOKENS} tokens")
