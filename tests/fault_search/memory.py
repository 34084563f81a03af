"""KV memory with contents that can be checked, and the model: a hash of what was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.fault_search.scenario import BLOCK_SIZE, VOCAB_SIZE, RequestSpec

NOTHING = 0
"""Contents of a position that was never written."""


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
        self.last_tokens: dict[int, int] = {}
        self.cells: dict[int, int] = {}
        self.waiters: list[Callable[[], None]] = []
        self._check_write = check_write

    def read(self, table: Sequence[int], position: int) -> int:
        return self.blocks[table[position // BLOCK_SIZE]][position % BLOCK_SIZE]

    def write(self, block: int, offset: int, contents: int) -> None:
        self._check_write(self, block, offset, contents)
        self.blocks[block][offset] = contents

    def on_step_done(self, cell: int, step_id: int) -> None:
        self.cells[cell] = step_id
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter()
