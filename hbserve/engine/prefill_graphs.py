"""Steps with prompt chunks as piecewise CUDA graphs: one launch for everything between two attentions.

    │ embedding, QKV │ attention 0 │ output, MLP, QKV │ attention 1 │ ... │ output, MLP, norm │
    └─── graph 0 ────┘   eager     └──── graph 1 ─────┘   eager           └──── graph N ──────┘

Attention differs from step to step and is launched eagerly. Everything else has fixed shapes for a fixed number of
tokens, so each piece is captured for several token counts, and a step is padded to the next count. That saves the host
most launches. It pays where a layer takes the GPU less time than the host takes to launch it: for short chunks and
small models. Larger steps run eagerly and lose nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hbserve.attention.base import AttentionBackend
from hbserve.engine.batch import StepBatch
from hbserve.engine.capture import Parts, capturing, compiling, run_through, run_to_capture
from hbserve.engine.graph_sizes import GraphSizes
from hbserve.layers.ops import ResidualStream
from hbserve.models.decoder import Decoder

logger = logging.getLogger(__name__)

_MAX_LAYER_FLOPS = 0.4e-3 * 700e12
"""FLOPs of a 700 TFLOP/s GPU in the time that the host takes to launch a layer eagerly."""

_MAX_TOKENS = 8192
_NOWHERE = -1
"""The slot of a padded token: it is not stored."""


@dataclass(frozen=True)
class _Pieces:
    """A captured step of a fixed number of tokens: ``graphs[i]`` ends before layer i's attention."""

    graphs: list[Any]
    hidden: torch.Tensor


class PrefillGraphs:
    """The captured pieces of one worker's steps.

    Args:
        attention: the backend that the steps between the pieces use.
        max_tokens: of a step.
        pool: memory of the graphs captured before; no two graphs run at a time, so they share it.
        defers: capture only some token counts now, and leave the others to `capture`.

    Attributes:
        sizes: the token counts with and without graphs.
    """

    def __init__(self, decoder: Decoder, attention: AttentionBackend, max_tokens: int, pool: Any, defers: bool) -> None:
        self._decoder, self._attention, self._pool = decoder, attention, pool
        self.sizes = GraphSizes(captured_token_counts(decoder, max_tokens), defers)
        device = decoder.embedding.device
        max_size = self.sizes.max
        self._token_ids = torch.zeros(max_size, dtype=torch.int64, device=device)
        self._positions = torch.zeros(max_size, dtype=torch.int64, device=device)
        self._slot_mapping = torch.full((max_size,), _NOWHERE, dtype=torch.int64, device=device)
        self._q, self._attended = decoder.heads_buffer(max_size), decoder.heads_buffer(max_size).zero_()
        self._pieces: dict[int, _Pieces] = {}
        self._capture_first(device, defers)

    def _capture_first(self, device: torch.device, is_awaited: bool) -> None:
        if not self.sizes.first:
            return
        started = time.perf_counter()
        before = torch.cuda.mem_get_info(device)[0]
        if is_awaited and self._decoder.can_skip_kernels:  # else others serve, and need the device
            with compiling(device):
                for size in self.sizes.missing:  # all: what is compiled later delays the steps of that time
                    self._begin(size)
                    self._rehearse(size)
        for size in self.sizes.first:
            run_through(self.capture(size))
        logger.info(
            "captured piecewise graphs for %d token counts up to %d in %.1f s, %.2f GiB; %d follow",
            *(len(self.sizes.first), self.sizes.max, time.perf_counter() - started),
            *((before - torch.cuda.mem_get_info(device)[0]) / (1 << 30), len(self.sizes.missing)),
        )

    def capture(self, size: int) -> Parts[None]:
        """Capture the steps of a token count, on all ranks of a group in the same order; in parts as `DecodeGraphs`."""
        self._pieces[size] = yield from self._capture(size)
        self.sizes.add(size)

    def _begin(self, size: int) -> None:
        """Prepare a step of padding."""
        self._attention.slot_mapping = self._slot_mapping[:size].fill_(_NOWHERE)  # the last step has left its own

    def _capture(self, size: int) -> Parts[_Pieces]:
        self._begin(size)
        run_to_capture(lambda: self._rehearse(size))
        graphs = []
        residual: ResidualStream | None = None
        for index in range(len(self._decoder.layers) + 1):
            yield
            self._attention.slot_mapping = self._slot_mapping[:size]  # a step in between has set its own
            graph: Any = torch.cuda.CUDAGraph()
            with capturing(graph, self._pool):
                if index < len(self._decoder.layers):
                    residual = self._piece(index, residual, size)
                else:
                    assert residual is not None, "a model has layers"
                    hidden = self._finish(residual, size)
            graphs.append(graph)
        return _Pieces(graphs, hidden)

    def _rehearse(self, size: int) -> None:
        """Load every kernel."""
        residual = self._piece(0, None, size)
        taps = self._decoder.taps
        begins = {layer + 1 for layer in self._decoder.typical_layers} | ({*taps.layers} if taps else set())
        for layer in sorted(begins):
            if layer < len(self._decoder.layers):
                self._piece(layer, residual, size)
        self._finish(residual, size)

    def _piece(self, index: int, residual: ResidualStream | None, size: int) -> ResidualStream:
        """Compute from the attention of the layer before, or from the embedding, up to this layer's attention."""
        if residual is None:
            residual = self._decoder.embed(self._token_ids[:size])
        else:
            self._decoder.after_attention(index - 1, residual, self._attended[:size], self._attention)
        self._decoder.before_attention(index, residual, self._positions[:size], self._attention, self._q[:size])
        return residual

    def _finish(self, residual: ResidualStream, size: int) -> torch.Tensor:
        last = len(self._decoder.layers) - 1
        self._decoder.after_attention(last, residual, self._attended[:size], self._attention)
        return self._decoder.finish(residual)

    def fits(self, num_tokens: int) -> bool:
        """Return whether a step of so many tokens is captured."""
        return num_tokens <= self.sizes.max

    def forward(
        self,
        batch: StepBatch,
        on_stored: Callable[[int], None] = lambda layer: None,
        layers: Iterable[int] | None = None,
    ) -> torch.Tensor:
        """Compute what `Decoder.forward` does, for a step that `fits` and that attention has begun."""
        num_tokens = len(batch.token_ids)
        size = self.sizes.choose(num_tokens)
        pieces = self._pieces[size]
        self._token_ids[:num_tokens].copy_(batch.token_ids)
        self._positions[:num_tokens].copy_(batch.positions)
        self._slot_mapping[:num_tokens].copy_(batch.attention.slot_mapping)
        self._slot_mapping[num_tokens:size].fill_(_NOWHERE)
        q, attended = self._q[:num_tokens], self._attended[:num_tokens]
        for index in range(len(pieces.graphs) - 1) if layers is None else layers:
            pieces.graphs[index].replay()
            on_stored(index)
            self._attention.attend(index, q, attended)
        pieces.graphs[-1].replay()
        return pieces.hidden[:num_tokens]


def captured_token_counts(decoder: Decoder, max_tokens: int) -> list[int]:
    """Return the token counts to capture: those with which a layer takes less time than its launches."""
    flops_per_token = 2 * max(decoder.token_parameters(layer) for layer in decoder.typical_layers)
    max_size = min(max_tokens, _MAX_TOKENS, int(_MAX_LAYER_FLOPS / flops_per_token))
    counts = [64, 96, 128, 192, 256, 384, *range(512, 2048, 256), *range(2048, _MAX_TOKENS, 512)]
    sizes = [count for count in counts if count < max_size]
    return [*sizes, max_size] if max_size >= counts[0] else []
