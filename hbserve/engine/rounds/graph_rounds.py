"""Rounds of a captured decode step: the same graph again, before the host knows what the round before has sampled.

It runs in the thread that launches steps. `hbserve.engine.rounds.device_rounds` changes the graph's inputs between two
replays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hbserve.engine.rounds.device_rounds import DeviceRounds, RoundInputs
from hbserve.engine.sampler import Sampled
from hbserve.engine.staging import StepInputs
from hbserve.messages.worker import PlanRow


@dataclass(frozen=True)
class StepGraph:
    """A captured decode step, and the tensor of its sampled tokens: int64 ``[size]``."""

    graph: Any
    token_ids: torch.Tensor


@dataclass(frozen=True)
class _Repeatable:
    """A step that was launched, and whose next round follows from what the device has."""

    graph: StepGraph
    rounds: DeviceRounds
    num_rows: int
    num_logprobs: list[int]


class GraphRounds:
    """The rounds of the step that was launched last.

    Args:
        inputs: of all graphs.
        max_seq_len: no row may be computed beyond it.
    """

    def __init__(self, inputs: StepInputs, block_size: int, max_seq_len: int, vocab_size: int) -> None:
        self._inputs, self._block_size, self._max_seq_len = inputs, block_size, max_seq_len
        self._vocab_size = vocab_size
        self._last: _Repeatable | None = None

    def prepare(self, padding: PlanRow) -> None:
        """Compile the kernel, on a row of padding."""
        self._device_rounds([padding], np.zeros(1, np.int32), 1).advance(self._inputs.tensor("token_ids", 1))

    def allow(self, rows: list[PlanRow], rounds: int) -> bool:
        """Whether all rounds can be launched before a result is known; their samples must be plain."""
        ends = (max_end(row, rounds) for row in rows)
        return all(row.token_ids is not None for row in rows) and max(ends) <= self._max_seq_len

    def begin(
        self,
        graph: StepGraph,
        rows: list[PlanRow],
        indptr: npt.NDArray[np.int32],
        size: int,
        num_rows: int,
        num_logprobs: list[int],
    ) -> None:
        """Note a step that has just been launched and that these rounds `allow`.

        Args:
            indptr: where the pages of each row of the graph begin.
            size, num_rows: rows of the graph, and those that are no padding.
            num_logprobs: of each sample.
        """
        last_rows = np.cumsum([row.num_samples for row in rows]) - 1
        device_rounds = self._device_rounds(rows, indptr[last_rows], size)
        self._last = _Repeatable(graph, device_rounds, num_rows, num_logprobs)

    @property
    def can_repeat(self) -> bool:
        """Whether `repeat` can launch the next round of the step that was launched last."""
        return self._last is not None

    def end(self) -> None:
        """Note that another step is about to be launched."""
        self._last = None

    def repeat(self) -> tuple[Sampled, list[int]]:
        """Launch the next round of the last step, before its result is known. The caller counts the rounds.

        Returns:
            As `hbserve.engine.decode_graphs.DecodeGraphs.launch`. The tokens count for nothing if the round before has
            ended the step.
        """
        step = self._last
        assert step is not None, "the next round's plan must be computed from the result"
        step.rounds.advance(step.graph.token_ids)
        step.graph.graph.replay()
        return Sampled(step.graph.token_ids[: step.num_rows], None), step.num_logprobs

    def _device_rounds(self, rows: list[PlanRow], first_pages: npt.NDArray[np.int32], size: int) -> DeviceRounds:
        tensor = self._inputs.tensor
        inputs = RoundInputs(
            token_ids=tensor("token_ids", size),
            positions=tensor("positions", size),
            num_stored=tensor("num_stored", size),
            slot_mapping=tensor("slot_mapping", size),
            indices=self._inputs.indices,
            block_size=self._block_size,
        )
        return DeviceRounds(rows, inputs, first_pages, self._vocab_size)


def max_end(row: PlanRow, rounds: int) -> int:
    """Return the position behind all that a row can compute in its rounds; in each it starts before its stop."""
    length = row.num_samples
    return max(row.start + length, min(row.start + rounds * length, row.stop - 1 + length))
