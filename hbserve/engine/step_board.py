"""What workers on the same arenas tell each other without the scheduler: which steps are done, and what they sampled.

So a worker can have its plan while another one's step still runs, and begin when that ends: a change of worker
between two steps costs neither a result's way to the scheduler nor a plan's way back. The board is host memory of
the process that holds the arenas. Each worker has a cell there, with the id of its last step that is done, and
each slot has the token that was sampled last. A step's tokens are written before its cell; whoever waits for the
cell reads them after it.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from hbserve.messages.worker import NUM_BOARD_CELLS, PlanRow, StepPlan, StepRef

_POLL_S = 20e-6
_SET_TIMER_SLACK = 29  # of prctl(2)
_TIMER_SLACK_NS = 1000
"""How late a thread may be woken; Linux takes 50 µs where nothing is said."""
_ITEM_BYTES = 8


@dataclass(frozen=True, slots=True)
class BoardEntry:
    """What will be noted of a step that is under way.

    Attributes:
        slots: int64, of the rows that are sampled; none where nobody goes on with them.
        ends: int64, the positions that their tokens are for.
    """

    cell: int
    step_id: int
    slots: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class StepBoard:
    """One process' view of it. The thread that makes it launches and waits; another collects results and notes them.

    Args:
        memory: uint8 ``[num_bytes]``, zeros at first.
        samples: whether this worker's tokens are for others to go on with. Not prefill's: a slot may have a new
            sequence there while a step of the old one is still under way elsewhere.
    """

    def __init__(self, memory: torch.Tensor, max_num_seqs: int, samples: bool) -> None:
        items = memory.numpy().view(np.int64)
        self._done, self._token_ids, self._positions = np.split(
            items, [NUM_BOARD_CELLS, NUM_BOARD_CELLS + max_num_seqs]
        )
        self._samples = samples
        self._lost: dict[int, int] = {}
        self._deadline = float("inf")
        self._tokens_may_be_wrong = False
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, ctypes.c_ulong(_TIMER_SLACK_NS))

    @staticmethod
    def num_bytes(max_num_seqs: int) -> int:
        """The size of its memory."""
        return _ITEM_BYTES * (NUM_BOARD_CELLS + 2 * max_num_seqs)

    def entry(self, plan: StepPlan) -> BoardEntry | None:
        """What to `note` when a plan's step is done; None: nobody wants to know."""
        if plan.cell is None:
            return None
        sampled = [row for row in plan.rows if row.sample] if self._samples else []
        slots = np.array([row.slot for row in sampled], np.int64)
        ends = np.array([row.start + row.num_tokens for row in sampled], np.int64)
        return BoardEntry(plan.cell, plan.step_id, slots, ends)

    def note(self, entry: BoardEntry, token_ids: list[int]) -> None:
        """A step is done, and has sampled these tokens. Somebody may be waiting: all else comes later."""
        if entry.slots.size:
            self._token_ids[entry.slots] = token_ids
            self._positions[entry.slots] = entry.ends
        self._done[entry.cell] = entry.step_id

    def on_step_lost(self, step: StepRef) -> None:
        """The worker of that cell has ended; who waits for the step need not."""
        self._lost[step.cell] = step.step_id

    def limit_waits(self, seconds: float) -> None:
        """Nobody waits for longer than that from now on. Callable from any thread."""
        self._deadline = time.monotonic() + seconds

    def wait(self, step: StepRef) -> None:
        """Wait until a step is done, or known to be lost.

        Raises:
            TimeoutError: in the end, see `limit_waits`; until then it is whoever watches the worker's steps that
                has a deadline.
        """
        while self._done[step.cell] < step.step_id:
            if self._lost.get(step.cell, 0) >= step.step_id:
                self._tokens_may_be_wrong = True
                return
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"another worker has not done its step {step.step_id}, and this one is to end")
            time.sleep(_POLL_S)
        self._tokens_may_be_wrong = False

    def tokens(self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What others have sampled for these slots at these positions.

        After a lost step that may be any tokens that were sampled once: what is made of them counts for nothing.
        """
        is_there = self._tokens_may_be_wrong or (self._positions[slots] == positions).all()
        assert is_there, "the board has no token for the position that a row starts at"
        token_ids: npt.NDArray[np.int64] = self._token_ids[slots]
        return token_ids

    def with_tokens(self, rows: list[PlanRow]) -> list[PlanRow]:
        """The rows with `tokens` in those that need some."""
        waiting = [row for row in rows if row.sampled_elsewhere]
        if not waiting:
            return rows
        slots, starts = np.array([(row.slot, row.start) for row in waiting], np.int64).T
        tokens = iter(self.tokens(slots, starts).tolist())
        return [
            msgspec.structs.replace(row, token_ids=[next(tokens)], sampled_elsewhere=False)
            if row.sampled_elsewhere
            else row
            for row in rows
        ]
