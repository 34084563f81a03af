"""Triton kernels that choose experts and group the tokens by expert; nothing waits for the host.

A pair is a token and one of its experts: pair ``token * num_chosen + i``. `group_pairs` sorts pairs by expert and cuts
each expert's pairs into tiles of ``tile_rows`` rows, so that a tile reads the weights of one expert only::

    expert       2             5             7
    pairs        a b c d e     f             g h i j k l m n
    tiles of 4  [a b c d][e   ][f          ][g h i j][k l m n]

The last tile of an expert may have empty rows. The order of an expert's pairs depends on the order of atomic additions.
That changes no result: rows of a tile are computed independently of each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hbserve.model_families.declaration import Experts
from hbserve.platform.cuda_driver import overlaps

_BLOCK_PAIRS = 512


class Choice(NamedTuple):
    """The experts of some tokens.

    Attributes:
        experts: int32 ``[tokens, chosen]``, counted from this rank's first; -1: another rank's, or a padded token.
        weights: ``[tokens, chosen]``, in the dtype of the router's outputs.
        places: int32 ``[tokens, chosen]``, the place of a pair among those of its expert; undefined without ``counts``.
    """

    experts: Tensor
    weights: Tensor
    places: Tensor


class Groups(NamedTuple):
    """Pairs by expert.

    Attributes:
        pairs: int32, the pairs in the order of the tiles' rows; empty rows are undefined.
        tile_experts: int32 ``[tiles]``.
        ends: int32 ``[experts]``, the row after the last pair of an expert.
        num_tiles: int32 ``[1]``; later entries of ``tile_experts`` are undefined.
    """

    pairs: Tensor
    tile_experts: Tensor
    ends: Tensor
    num_tiles: Tensor


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    logits, bias, slots, chosen, weights, places, counts, totals, num_experts, first_expert, num_local, scale,
    num_chosen: tl.constexpr, block: tl.constexpr, block_chosen: tl.constexpr, is_sigmoid: tl.constexpr,
    has_bias: tl.constexpr, is_renormalised: tl.constexpr, has_slots: tl.constexpr, has_counts: tl.constexpr,
    overlap: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, block)
    mask = experts < num_experts
    if has_bias:
        biases = tl.load(bias + experts, mask=mask, other=0.0)
    is_real = True
    if has_slots:
        is_real = tl.load(slots + token) >= 0
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(logits + token * num_experts + experts, mask=mask, other=-float("inf")).to(tl.float32)
    if is_sigmoid:
        scores = 1.0 / (1.0 + tl.exp(-values))
    else:
        scores = tl.exp(values - tl.max(values, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    ranked = tl.where(mask, scores, -float("inf"))
    if has_bias:
        ranked += biases
    lanes = tl.arange(0, block_chosen)
    best_experts = tl.zeros([block_chosen], tl.int32)
    best_scores = tl.zeros([block_chosen], tl.float32)
    for lane in tl.static_range(num_chosen):
        # NaN compares false, so this index may be past the last expert: take that one, and let the result be NaN
        best = tl.min(tl.where(ranked == tl.max(ranked, axis=0), experts, block), axis=0)
        best = tl.minimum(best, num_experts - 1)
        best_experts = tl.where(lanes == lane, best, best_experts)
        best_scores = tl.where(lanes == lane, tl.sum(tl.where(experts == best, scores, 0.0), axis=0), best_scores)
        ranked = tl.where(experts == best, -float("inf"), ranked)
    if is_renormalised:
        best_scores = best_scores / (tl.sum(best_scores, axis=0) + 1e-20)
    pairs = token * num_chosen + lanes
    in_row = lanes < num_chosen
    local = best_experts - first_expert
    is_local = in_row & is_real & (local >= 0) & (local < num_local)
    tl.store(chosen + pairs, tl.where(is_local, local, -1), mask=in_row)
    tl.store(weights + pairs, (best_scores * scale).to(weights.dtype.element_ty), mask=in_row)
    tl.atomic_add(totals + best_experts, 1, mask=in_row & is_real)
    if has_counts:
        tl.store(places + pairs, tl.atomic_add(counts + local, 1, mask=is_local), mask=is_local)


def choose(
    logits: Tensor,
    bias: Tensor | None,
    experts: Experts,
    local: tuple[int, int],
    slots: Tensor | None,
    totals: Tensor,
    counts: Tensor | None,
) -> Choice:
    """Compute `hbserve.layers.experts.choose_experts` of ``logits [tokens, experts]``, without groups of experts.

    Args:
        local: first and number of this rank's experts.
        slots: int64 ``[tokens]``, negative for a padded token, which gets no expert; None: no token is padded.
        totals: int64 ``[experts]``; the pairs of each expert of any rank are added.
        counts: int32 ``[local experts]``, zero before; the pairs of each local expert are added. None: `group_pairs`
            does not follow.
    """
    num_tokens, num_experts = logits.shape
    num_chosen = experts.num_chosen
    chosen, places = (torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=logits.device) for _ in range(2))
    weights = torch.empty(num_tokens, num_chosen, dtype=logits.dtype, device=logits.device)
    block = triton.next_power_of_2(num_experts)
    overlap = overlaps(logits.device)
    _choose_kernel[(num_tokens,)](
        logits, logits if bias is None else bias, logits if slots is None else slots, chosen, weights, places,
        totals if counts is None else counts, totals, num_experts, *local, experts.scale,
        num_chosen, block, triton.next_power_of_2(num_chosen), experts.scoring == "sigmoid",
        bias is not None, experts.is_renormalised, slots is not None, counts is not None, overlap,
        num_warps=max(1, min(4, block // 256)), launch_pdl=overlap,
    )  # fmt: skip
    return Choice(chosen, weights, places)


@triton.jit
def _cut_kernel(  # type: ignore[no-untyped-def]
    counts, starts, ends, tile_experts, num_tiles, num_experts,
    block: tl.constexpr, tile_rows: tl.constexpr, overlap: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, block)
    mask = experts < num_experts
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    pairs = tl.load(counts + experts, mask=mask, other=0)
    tiles = (pairs + tile_rows - 1) // tile_rows
    first = tl.cumsum(tiles, axis=0) - tiles
    tl.store(starts + experts, first * tile_rows, mask=mask)
    tl.store(ends + experts, first * tile_rows + pairs, mask=mask)
    tl.store(num_tiles, tl.sum(tiles, axis=0))
    tl.store(counts + experts, tl.zeros([block], tl.int32), mask=mask)  # as the next layer needs them
    for tile in range(0, tl.max(tiles, axis=0)):
        tl.store(tile_experts + first + tile, experts, mask=tile < tiles)


@triton.jit
def _sort_kernel(  # type: ignore[no-untyped-def]
    chosen, places, starts, sorted_pairs, num_pairs, block: tl.constexpr, overlap: tl.constexpr
):
    pairs = tl.program_id(0) * block + tl.arange(0, block)
    if overlap:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(chosen + pairs, mask=pairs < num_pairs, other=-1)
    is_local = expert >= 0
    place = tl.load(places + pairs, mask=is_local, other=0) + tl.load(starts + expert, mask=is_local, other=0)
    tl.store(sorted_pairs + place, pairs, mask=is_local)


def group_pairs(choice: Choice, counts: Tensor, groups: Groups, starts: Tensor, tile_rows: int) -> None:
    """Fill ``groups``; ``counts`` are what `choose` has counted, and are zero afterwards.

    Args:
        groups, starts: memory of `max_tiles` tiles and ``tile_rows`` times as many rows, and of all local experts.
    """
    overlap = overlaps(counts.device)
    block = triton.next_power_of_2(len(counts))
    _cut_kernel[(1,)](
        counts, starts, groups.ends, groups.tile_experts, groups.num_tiles, len(counts), block, tile_rows, overlap,
        num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    num_pairs = choice.experts.numel()
    _sort_kernel[(triton.cdiv(num_pairs, _BLOCK_PAIRS),)](
        choice.experts, choice.places, starts, groups.pairs, num_pairs, _BLOCK_PAIRS, overlap, launch_pdl=overlap
    )


def max_tiles(num_pairs: int, num_experts: int, tile_rows: int) -> int:
    """Return the number of tiles that suffices however ``num_pairs`` are spread over ``num_experts``."""
    return min(num_pairs, num_experts + num_pairs // tile_rows)
