"""Lookup of the longest suffix: in a sequence's own tokens, and in recent outputs of other requests.

The idea is that of SuffixDecoding (Oliaro et al. 2024), which keeps suffix trees. Here an index of token triples finds
the last few places that end as the sequence does, and comparing backwards finds the one with the longest match. It
needs less memory than a tree and a few microseconds for a guess.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Items

from hbserve.speculation.drafters import MAX_TOKENS_PER_CALL

_ORDER = 3
_MAX_PLACES = 4
"""Places that are kept for each triple: the last ones."""
_MAX_MATCH = 16
_MAX_INDEXED = 16384
"""Tokens of a long prompt that are indexed, from its end. A token costs about 250 bytes."""
_OUTPUTS_PER_CALL = 64
"""Tokens of other requests' outputs that a call indexes: more than a sequence gets in the meantime."""
_POOL_TOKENS = 32768
"""Tokens of recent outputs in each half of a pool."""
_MAX_POOLS = 16

Gram = tuple[int, ...]


class _Index:
    """Tokens, and the places behind each triple of them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[Gram, list[int]] = {}

    def extend(self, tokens: Items[int]) -> None:
        """Append tokens; a place enters the index when the token there is known."""
        mine, places = self.tokens, self._places
        begin = len(mine)
        mine += tokens
        for place in range(max(begin, _ORDER), len(mine)):
            found = places.setdefault(tuple(mine[place - _ORDER : place]), [])
            found.append(place)
            if len(found) > _MAX_PLACES:
                del found[0]

    def matches(self, suffix: Items[int]) -> Iterator[tuple[int, int]]:
        """Yield for each place that ends as ``suffix`` does the length of the match and the place, last place first."""
        for place in reversed(self._places.get(tuple(suffix[-_ORDER:]), ())):
            length, most = _ORDER, min(_MAX_MATCH, place, len(suffix))
            while length < most and self.tokens[place - length - 1] == suffix[-length - 1]:
                length += 1
            yield length, place


class OutputPool:
    """Recent outputs, which requests of one ``cache_salt`` share; the older half is dropped when the newer is full.

    The end of a request takes no time: what drafters ask for is indexed when they ask.
    """

    def __init__(self) -> None:
        self.halves = [_Index(), _Index()]
        self._waiting: deque[list[int]] = deque()
        self._num_waiting = 0

    def add(self, tokens: list[int], num_prompt_tokens: int) -> None:
        """Remember an output, and the last tokens of its prompt, which lead to it."""
        begin = max(0, num_prompt_tokens - _ORDER)
        output = tokens[begin : begin + _POOL_TOKENS]
        self._waiting.append(output)
        self._num_waiting += len(output)
        while self._num_waiting > _POOL_TOKENS:
            self._num_waiting -= len(self._waiting.popleft())

    def read(self) -> None:
        """Index some of the outputs that wait for it."""
        num_left = _OUTPUTS_PER_CALL
        while num_left and self._waiting:
            if len(self.halves[0].tokens) >= _POOL_TOKENS:
                self.halves = [_Index(), self.halves[0]]
            output = self._waiting[0]
            self.halves[0].extend(output[:num_left])
            num_read = min(num_left, len(output))
            del output[:num_read]
            num_left -= num_read
            self._num_waiting -= num_read
            if not output:
                self._waiting.popleft()


class OutputPools:
    """A pool for each of the salts that were used last: what one tenant's outputs hold is guessed for no other."""

    def __init__(self) -> None:
        self._pools: OrderedDict[str | None, OutputPool] = OrderedDict()

    def of(self, cache_salt: str | None) -> OutputPool:
        """Return the pool of a salt."""
        pool = self._pools.setdefault(cache_salt, OutputPool())
        self._pools.move_to_end(cache_salt)
        if len(self._pools) > _MAX_POOLS:
            self._pools.popitem(last=False)
        return pool


class SuffixDrafter:
    """What followed the longest suffix, in the sequence itself or in recent outputs; a longer match guesses further.

    Where an edited text differs from its source, no suffix is found. The drafter then keeps its place in the source: it
    takes the next one or two tokens for inserted ones.
    """

    name = "suffix"

    def __init__(self, pool: OutputPool) -> None:
        self._pool = pool
        self._own = _Index()
        self._begin: int | None = None  # the first token that is indexed
        self._source, self._place = self._own, 0  # where the last guess came from, and where the source goes on
        self._num_seen = 0
        self._num_inserted = _ORDER  # tokens since then that the source does not have

    def draft(self, tokens: Items[int], max_tokens: int) -> list[int]:
        """See `hbserve.speculation.drafters.Drafter`."""
        if len(tokens) < _ORDER:
            return []
        if self._begin is None:
            self._begin = max(0, len(tokens) - _MAX_INDEXED)
        begin = self._begin + len(self._own.tokens)
        self._own.extend(tokens[begin : begin + MAX_TOKENS_PER_CALL])
        self._pool.read()
        self._follow(tokens)
        suffix = tokens[-_MAX_MATCH:]
        best_length, best_place, best = 0, 0, self._own
        for index in (self._own, *self._pool.halves):
            for length, place in index.matches(suffix):
                if length > best_length:
                    best_length, best_place, best = length, place, index
            if best_length == _MAX_MATCH:
                break
        if best_length:
            self._source, self._place, self._num_inserted = best, best_place, 0
        elif self._num_inserted < _ORDER:
            best, best_place, best_length = self._source, self._place, _ORDER
        return best.tokens[best_place : best_place + min(max_tokens, best_length)] if best_length else []

    def _follow(self, tokens: Items[int]) -> None:
        """Go on in the source: over a token that it has, or over one that was left out or replaced before it."""
        source = self._source.tokens
        for token in tokens[self._num_seen :] if self._num_inserted < _ORDER else ():
            following = source[self._place : self._place + 2]
            if token in following:
                self._place += 1 + following.index(token)
                self._num_inserted = 0
            else:
                self._num_inserted += 1
        self._num_seen = len(tokens)
