"""What workers on the same arenas tell each other without the scheduler: which steps are done, and what they sampled.

So a worker can have its plan while another one's step still runs, and begin when that ends: a change of worker
between two steps costs neither a result's way to the scheduler nor a plan's way back. The board is host memory of
the process that holds the arenas. Each worker has a cell there, with the id of its last step that is done, and
each slot has the token that was sampled last. A step's tokens are written before its cell; whoever waits for the
cell reads them after it.
"""

from __future__ import annotations

import time

import msgspec
import numpy as np
import torch

from hbserve.messages.worker import NUM_BOARD_CELLS, PlanRow, StepOf, StepPlan, StepResult

_POLL_S = 20e-6
_ITEM_BYTES = 8


class StepBoard:
    """One process' view of it. The thread that launches waits, the one that collects results notes them.

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
        self._may_be_wrong = False

    @staticmethod
    def num_bytes(max_num_seqs: int) -> int:
        """The size of its memory."""
        return _ITEM_BYTES * (NUM_BOARD_CELLS + 2 * max_num_seqs)

    def note(self, plan: StepPlan, result: StepResult) -> None:
        """A step is done."""
        if plan.cell is None:
            return
        if self._samples:
            sampled = [row for row in plan.rows if row.sample]
            slots = [row.slot for row in sampled]
            self._token_ids[slots] = result.token_ids
            self._positions[slots] = [row.start + row.num_tokens for row in sampled]
        self._done[plan.cell] = plan.step_id

    def note_lost(self, step: StepOf) -> None:
        """The worker of that cell has ended; who waits for the step need not."""
        self._lost[step.cell] = step.step_id

    def end_waits_in(self, seconds: float) -> None:
        """Nobody waits for longer than that from now on. Callable from any thread."""
        self._deadline = time.monotonic() + seconds

    def wait(self, step: StepOf) -> None:
        """Wait until a step is done, or known to be lost.

        Raises:
            TimeoutError: in the end, see `end_waits_in`; until then it is whoever watches the worker's steps that
                has a deadline.
        """
        while self._done[step.cell] < step.step_id:
            if self._lost.get(step.cell, 0) >= step.step_id:
                self._may_be_wrong = True
                return
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"another worker has not done its step {step.step_id}, and this one is to end")
            time.sleep(_POLL_S)
        self._may_be_wrong = False

    def with_tokens(self, rows: list[PlanRow]) -> list[PlanRow]:
        """The rows with tokens that others have sampled.

        After a lost step that may be any that was sampled once: what is made of it counts for nothing.
        """
        slots = [row.slot for row in rows if row.sampled_elsewhere]
        if not slots:
            return rows
        starts = [row.start for row in rows if row.sampled_elsewhere]
        are_there = self._may_be_wrong or (self._positions[slots] == starts).all()
        assert are_there, "the board has no token for the position that a row starts at"
        tokens = iter(self._token_ids[slots].tolist())
        return [
            msgspec.structs.replace(row, token_ids=[next(tokens)], sampled_elsewhere=False)
            if row.sampled_elsewhere
            else row
            for row in rows
        ]
