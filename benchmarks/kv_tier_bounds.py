"""``python -m benchmarks kv_tier_bounds``: what a KV tier of a size can be worth at most on a trace, without a GPU.

For each size and rule of replacement: the share of the prompt tokens that a cache has, and how many times faster a GPU
computes all prompts than with the pool alone, if loads take no time and prompts are all of the work. Blocks have 512
tokens, as in the trace, and prompts come one after the other.

lru     forgets what was used least recently, as HBServe does
s3fifo  S3-FIFO (Yang et al., SOSP 2023): a small queue for what is new, a large one for what was used again
future  forgets what is used last again (Belady, 1966)
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hbserve.bench.arguments import positive
from hbserve.bench.traces import BLOCK_TOKENS, TraceEntry, load_trace
from hbserve.policy.profile_file import profiled_predictor

_SMALL_SHARE = 0.1
_MAX_USES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake's format")
    parser.add_argument("--pool-tokens", type=positive, default=136_000, help="of the pool alone (default: 136000)")
    sizes = [786_000, 1_436_000, 6_000_000]
    parser.add_argument("--tokens", type=positive, nargs="+", default=sizes, help="that pool and tier hold")
    parser.add_argument("--max-input-len", type=positive, default=32_768, help="leave longer prompts out")


def run(arguments: argparse.Namespace) -> None:
    """Compute and print."""
    entries = [entry for entry in load_trace(arguments.trace) if entry.input_len <= arguments.max_input_len]
    share, alone_s = _replay(entries, _Lru(arguments.pool_tokens // BLOCK_TOKENS))
    print(f"{len(entries)} requests; the pool alone has {share:.1%}; computing takes {alone_s:.0f} s")
    kinds: dict[str, Callable[[int], _Cache]] = {
        "lru": _Lru,
        "s3fifo": _S3Fifo,
        "future": lambda num_blocks: _Future(num_blocks, entries),
    }
    for tokens in arguments.tokens:
        for name, kind in kinds.items():
            share, seconds = _replay(entries, kind(tokens // BLOCK_TOKENS))
            print(f"{tokens:>10} tokens, {name:>6}: {share:6.1%}, {alone_s / seconds:.2f} times", flush=True)


def _replay(entries: Sequence[TraceEntry], cache: _Cache) -> tuple[float, float]:
    """Return the share of the prompt tokens that the cache has, and the seconds to compute the others."""
    predictor, num_tokens, num_cached, seconds = profiled_predictor(), 0, 0, 0.0
    for number, entry in enumerate(entries):
        blocks = next((at for at, key in enumerate(entry.block_ids) if key not in cache), len(entry.block_ids))
        cached = min(blocks * BLOCK_TOKENS, entry.input_len - 1)
        num_tokens, num_cached = num_tokens + entry.input_len, num_cached + cached
        seconds += predictor.prompt_s(entry.input_len - cached, cached)
        cache.use(number, entry.block_ids)
    return num_cached / num_tokens, seconds


class _Cache(Protocol):
    def __contains__(self, key: int) -> bool: ...

    def use(self, number: int, keys: Sequence[int]) -> None:
        """Take in the blocks of a request; its end is forgotten before its beginning."""


class _Lru:
    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._keys: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def use(self, number: int, keys: Sequence[int]) -> None:
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._num_blocks:
            self._keys.popitem(last=False)


class _S3Fifo:
    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._new, self._known, self._forgotten = deque[int](), deque[int](), OrderedDict[int, None]()
        self._uses: dict[int, int] = {}  # of what is in one of the first two queues

    def __contains__(self, key: int) -> bool:
        return key in self._uses

    def use(self, number: int, keys: Sequence[int]) -> None:
        for key in reversed(keys):
            if key in self._uses:
                self._uses[key] = min(_MAX_USES, self._uses[key] + 1)
                continue
            (self._known if key in self._forgotten else self._new).append(key)
            self._forgotten.pop(key, None)
            self._uses[key] = 0
            while len(self._uses) > self._num_blocks:
                self._evict()

    def _evict(self) -> None:
        if len(self._new) > _SMALL_SHARE * self._num_blocks or not self._known:
            key = self._new.popleft()
            if not self._uses[key]:
                del self._uses[key]
                self._forgotten[key] = None
                if len(self._forgotten) > self._num_blocks:
                    self._forgotten.popitem(last=False)
                return
            self._uses[key] = 0
        else:
            key = self._known.popleft()
            if not self._uses[key]:
                del self._uses[key]
                return
            self._uses[key] -= 1
        self._known.append(key)


class _Future:
    def __init__(self, num_blocks: int, entries: Sequence[TraceEntry]) -> None:
        self._num_blocks = num_blocks
        self._keys: set[int] = set()
        self._uses: defaultdict[int, deque[int]] = defaultdict(deque)  # numbers of the requests to come
        for number, entry in enumerate(entries):
            for key in entry.block_ids:
                self._uses[key].append(number)

    def __contains__(self, key: int) -> bool:
        return key in self._keys

    def use(self, number: int, keys: Sequence[int]) -> None:
        for key in keys:
            while self._uses[key] and self._uses[key][0] <= number:
                self._uses[key].popleft()
        self._keys.update(keys)
        if len(self._keys) > self._num_blocks:
            self._keys = set(heapq.nsmallest(self._num_blocks, self._keys, key=self._next_use))

    def _next_use(self, key: int) -> float:
        uses = self._uses[key]
        return uses[0] if uses else math.inf
