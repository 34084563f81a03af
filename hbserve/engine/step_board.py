"""The step board: workers on the same arenas tell each other which steps are done and what they sampled.

So the scheduler can send a worker its plan while another worker's step still runs, and the step begins as soon as the
other one ends. A change of worker between two steps then costs no result to the scheduler and no plan back.

The board is host memory of the process that holds the arenas. Each worker has a cell there, with the id of its last
step that is done. Each slot has the token that was sampled last. A worker writes a step's tokens before its cell, and a
waiting worker reads the cell before the tokens.
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
"""How late Linux may wake a thread; the default is 50 µs."""
_ITEM_BYTES = 8


@dataclass(frozen=True, slots=True)
class BoardEntry:
    """The entry that a step under way will make.

    Attributes:
        slots: int64, of the rows that are sampled; none if no other worker continues them.
        ends: int64, the positions of their tokens.
        samples: int64, the places of their tokens among those of the step.
    """

    cell: int
    step_id: int
    slots: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]


class StepBoard:
    """A board as one process sees it. Its main thread launches and waits; its collector thread notes results.

    Args:
        memory: uint8 ``[num_bytes]``, zeros at first.
        samples: whether other workers continue with this worker's tokens. A prefill worker's tokens they do not: its
            slot may have a new sequence while a step of the old one is still under way on another worker.
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
        """Return the size of a board's memory."""
        return _ITEM_BYTES * (NUM_BOARD_CELLS + 2 * max_num_seqs)

    def entry(self, plan: StepPlan) -> BoardEntry | None:
        """Return the entry to `note` when a plan's step is done; None if no worker waits for it."""
        if plan.cell is None:
            return None
        sampled, samples, place = [], [], 0
        for row in plan.rows if self._samples else ():
            if row.sample and not row.num_drafts:  # the next row of a draft has its token in its plan
                sampled.append(row)
                samples.append(place)
            place += row.num_samples
        slots = np.array([row.slot for row in sampled], np.int64)
        ends = np.array([row.start + row.num_tokens for row in sampled], np.int64)
        return BoardEntry(plan.cell, plan.step_id, slots, ends, np.array(samples, np.int64))

    def note(self, entry: BoardEntry, token_ids: list[int]) -> None:
        """Note that a step is done and has sampled these tokens. Do it first: another worker may be waiting."""
        if entry.slots.size:
            self._token_ids[entry.slots] = np.array(token_ids, np.int64)[entry.samples]
            self._positions[entry.slots] = entry.ends
        self._done[entry.cell] = entry.step_id

    def on_step_lost(self, step: StepRef) -> None:
        """End the wait for a step of a worker that has ended. Called in the event loop's thread."""
        self._lost[step.cell] = step.step_id

    def limit_waits(self, seconds: float) -> None:
        """Let `wait` last at most so long from now on. Callable from any thread."""
        self._deadline = time.monotonic() + seconds

    def wait(self, step: StepRef) -> None:
        """Wait until a step is done, or known to be lost.

        Raises:
            TimeoutError: after the time of `limit_waits`. Without that, the event loop's watch over steps has a
                deadline.
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
        """Return what other workers have sampled for these slots at these positions.

        After a lost step these may be old tokens; the scheduler ignores what is computed from them.
        """
        is_there = self._tokens_may_be_wrong or (self._positions[slots] == positions).all()
        assert is_there, "the board has no token for the position that a row starts at"
        token_ids: npt.NDArray[np.int64] = self._token_ids[slots]
        return token_ids

    def with_tokens(self, rows: list[PlanRow]) -> list[PlanRow]:
        """Return the rows, with `tokens` in the rows that were sampled elsewhere."""
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
