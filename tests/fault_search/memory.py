"""KV memory with contents that can be checked, and the model: a hash of what was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from tests.fault_search.scenario import BLOCK_SIZE, VOCAB_SIZE, RequestSpec

NOTHING = 0
"""Contents of a position that was never written."""
NUM_LAYERS = 4
MAX_RANKS = 2
_LAYER_BITS, _HEAD_BITS = 16, 8
UNMERGED = 0x5A5A_5A5A_5A5A_5A5A
"""What the contents differ by, while the parts of several ranks lie one after the other in a block."""


@cache
def part_of(layer_group: int, num_groups: int, rank: int, num_ranks: int) -> int:
    """Return the bits of a position's contents that stand for a rank's heads in a group of layers."""
    layers, heads = NUM_LAYERS // num_groups, MAX_RANKS // num_ranks
    bits = [
        layer * _LAYER_BITS + head * _HEAD_BITS + bit
        for layer in range(layer_group * layers, (layer_group + 1) * layers)
        for head in range(rank * heads, (rank + 1) * heads)
        for bit in range(_HEAD_BITS)
    ]
    mask = sum(1 << bit for bit in bits)
    is_last = bits[-1] == NUM_LAYERS * _LAYER_BITS - 1
    return mask - (1 << (bits[-1] + 1)) if is_last else mask  # the sign of a hash goes with its highest bit


def kv_of(before: int, token: int) -> int:
    """Return the contents of a position: it depends on its token and, through the position before, on all others."""
    return hash((before, token)) or 1


def next_token(contents: Sequence[int], seed: int, history: Sequence[int] | None, forbidden: Sequence[int]) -> int:
    """Return the token after these positions.

    Args:
        history: the tokens that a penalty or a grammar knows of.
        forbidden: end tokens, before ``min_tokens`` are there.
    """
    # Numbers only: in Python 3.11 the hash of None is another one in each process.
    token = hash((tuple(contents), seed, tuple(history or ()))) % VOCAB_SIZE
    while token in forbidden:
        token = (token + 1) % VOCAB_SIZE
    return token


def score_of(before: int, token: int) -> float:
    """Return the log-probability of a prompt's token after the contents of the position before it."""
    return float(hash((token, before)) % 1000)


def scores_of(prompt: Sequence[int]) -> list[float]:
    """Return the log-probabilities of a prompt's tokens from the second on."""
    contents, scores = kv_of(NOTHING, prompt[0]), []
    for token in prompt[1:]:
        scores.append(score_of(contents, token))
        contents = kv_of(contents, token)
    return scores


def answer_of(request: RequestSpec) -> list[int]:
    """Return the tokens of a request that nothing disturbs."""
    contents: list[int] = []
    for token in request.prompt:
        contents.append(kv_of(contents[-1] if contents else NOTHING, token))
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        token = next_token(contents, request.seed, tokens if request.keeps_state or request.late_masks else None, ())
        tokens.append(token)
        if token == request.end_token:
            break
        contents.append(kv_of(contents[-1], token))
    return tokens[len(request.prompt) :]


class Arena:
    """The KV blocks of one instance, and the board that its workers share.

    Args:
        check_write: called before each write with the arena, the block, the offset and the contents.

    Attributes:
        epoch: number of this memory; 0: it belongs to one worker and has that worker's epoch.
        drafts: KV blocks of the draft model.
        heads: what an EAGLE-3 head has read at each position: its feature, and the token behind it.
        last_tokens: the last token of each slot, as the board has it.
        cells: the last step that each worker has done, by cell.
        waiters: called when a step is done.
    """

    def __init__(
        self,
        instance_id: str,
        num_blocks: int,
        epoch: int,
        check_write: Callable[[Arena, int, int, int], None],
    ) -> None:
        self.instance_id = instance_id
        self.epoch = epoch
        self.blocks = [[NOTHING] * BLOCK_SIZE for _ in range(num_blocks)]
        self.drafts = [[NOTHING] * BLOCK_SIZE for _ in range(num_blocks)]
        self.heads: list[list[tuple[int, int] | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self.last_tokens: dict[int, int] = {}
        self.cells: dict[int, int] = {}
        self.waiters: list[Callable[[], None]] = []
        self._check_write = check_write

    def read(self, table: Sequence[int], position: int) -> int:
        return self.blocks[table[position // BLOCK_SIZE]][position % BLOCK_SIZE]

    def write(self, block: int, offset: int, contents: int, part: int = -1) -> None:
        """Write contents, or the bits of them that are a ``part``."""
        contents = (self.blocks[block][offset] & ~part) | (contents & part)
        self._check_write(self, block, offset, contents)
        self.blocks[block][offset] = contents

    def read_draft(self, table: Sequence[int], position: int) -> int:
        """Return what the draft model has at a position."""
        return self.drafts[table[position // BLOCK_SIZE]][position % BLOCK_SIZE]

    def feed_draft(self, table: Sequence[int], position: int, token: int) -> None:
        """Have the draft model read a token."""
        before = self.read_draft(table, position - 1) if position else NOTHING
        self.drafts[table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = kv_of(before, token)

    def feed_head(self, table: Sequence[int], position: int, token: int) -> None:
        """Have a head read a token with the feature before it, which comes with the KV."""
        block, offset = table[(position - 1) // BLOCK_SIZE], (position - 1) % BLOCK_SIZE
        self.heads[block][offset] = self.blocks[block][offset], token

    def head_has_read(self, table: Sequence[int], end: int) -> bool:
        """Whether a head has read the tokens of positions ``1 .. end - 1`` with the features before them.

        Sequences that share a block may differ in the token behind it, which its last place has.
        """
        for position in range(end - 1):
            read = self.heads[table[position // BLOCK_SIZE]][position % BLOCK_SIZE]
            contents = self.read(table, position)
            if read is None or read[0] != contents:
                return False
            if (position + 1) % BLOCK_SIZE and kv_of(contents, read[1]) != self.read(table, position + 1):
                return False
        return True

    def on_step_done(self, cell: int, step_id: int) -> None:
        self.cells[cell] = step_id
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()
